#!/usr/bin/env bash
# The project's checks, the same ones that CI runs: formatting, lints, the type check of the CUDA
# path, documentation, the kernels' tests on other processors, tests. What finds mistakes fastest runs
# first.
#
#     scripts/check.sh             # all stages
#     scripts/check.sh fmt tests   # only these; there are fmt lints cuda docs
#                                # aarch64 wasm model tests doctests
#
# Needs a Rust toolchain; installs rustfmt, clippy and a C compiler where they are missing. Tests run
# under nextest where it is installed. Most of a first run is building candle with optimizations.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

main() {
  if [ $# = 0 ]; then
    set -- fmt lints cuda docs aarch64 wasm model tests doctests
  fi
  local name
  for name in "$@"; do
    case $name in
      fmt | lints | cuda | docs | aarch64 | wasm | model | tests | doctests) ;;
      *) die "unknown stage $name; there are fmt, lints, cuda, docs, aarch64, wasm, model, tests, doctests" ;;
    esac
  done

  need_rust rustfmt clippy
  # CI builds once, from nothing: what only helps to build again is left out, and Cargo.lock is law.
  locked=""
  if [ "${CI:-}" = true ]; then
    export CARGO_INCREMENTAL=0
    locked=--locked
  fi
  test_log=${CARGO_TARGET_DIR:-target}/check-tests.log
  rm -f "$test_log"
  durations=""

  for name in "$@"; do
    case $name in
      fmt) stage "formatting" formatting ;;
      lints) stage "lints" lints ;;
      cuda) stage "CUDA path, with a stand-in compiler" scripts/check_cuda.sh ;;
      docs) stage "documentation" documentation ;;
      aarch64) stage "kernels on 64-bit ARM, emulated" scripts/check_aarch64.sh ;;
      wasm) stage "kernels on WebAssembly, in Node" scripts/check_wasm.sh ;;
      model) stage "the trained model that some tests ask" trained_model ;;
      tests) stage "tests" tests ;;
      doctests) stage "examples in the documentation" doctests ;;
    esac
  done
  printf '\nAll checks passed.\n%s' "$durations"
  if [ -f "$test_log" ]; then
    closing_test_line "$test_log"
  fi
}

formatting() {
  cargo fmt --all --check
  local script
  for script in .ci/run scripts/*.sh scripts/stub-cuda/nvcc; do
    bash -n "$script"
  done
}

lints() {
  cargo clippy $locked --workspace --all-targets -- -D warnings
}

documentation() {
  # The library and the binary are both called phi3 and would write the same pages.
  RUSTDOCFLAGS="-D warnings" cargo doc $locked --workspace --exclude phi3-cli --no-deps
}

# Without it the tests that need it are skipped, and say so.
trained_model() {
  need_python_venv .demo/venv
  local model
  model=$(.demo/venv/bin/python scripts/fetch_demo_model.py .demo)
  converted_demo_model "$model" f32
  converted_demo_model "$model" f16
}

tests() {
  mkdir -p "$(dirname "$test_log")"
  # JPEG by libjpeg-turbo's C code, which a workspace without the feature does not build.
  cargo test $locked -q -p phi3-image --features libjpeg --lib --tests
  if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run $locked --workspace --no-fail-fast 2>&1 | tee "$test_log"
  else
    cargo test $locked --workspace --lib --bins --tests --examples --no-fail-fast 2>&1 |
      tee "$test_log"
  fi
}

doctests() {
  cargo test $locked --workspace --doc
}

# stage HEADLINE FUNCTION: the script ends where it fails.
stage() {
  local headline=$1 start=$SECONDS status line
  printf '\n== %s\n' "$headline"
  # Not `|| status=$?`, which would switch set -e off inside.
  set +e
  (
    set -e
    "$2"
  ) </dev/null
  status=$?
  set -e
  line=$(printf '%5d s  %s' $((SECONDS - start)) "$headline")
  if [ $status != 0 ]; then
    printf '\nFAILED: %s (exit code %d)\n' "$line" $status >&2
    exit $status
  fi
  printf -- '-- %s\n' "$line"
  durations=$durations$line$'\n'
}

# The line with which nextest closes, or the sum of those that cargo test prints.
closing_test_line() {
  local escape=$'\033'
  sed "s/$escape\[[0-9;]*m//g" "$1" | awk '
    /^ *Summary \[/ { summary = $0 }
    /^test result:/ { binaries++; passed += $4; failed += $6; ignored += $8 }
    END {
      if (summary != "") print summary
      else printf "test result: ok. %d passed; %d failed; %d ignored; in %d binaries\n",
        passed, failed, ignored, binaries
    }'
}

main "$@"
