#!/bin/sh
# Fuzzes everything that reads a model's files: each target for SECONDS (60 unless told), or only
# the targets named behind it. Exits with 1 if one of them found something, or could not be built.
#
#   scripts/fuzz.sh [SECONDS [TARGET...]]
#
# Needs a nightly toolchain and a C++ compiler, nothing else. What is found is kept in
# fuzz/artifacts/TARGET; inputs that reach new code are kept in fuzz/corpus/TARGET for the next run.
set -eu
cd "$(dirname "$0")/../fuzz"

seconds=${1:-60}
case $seconds in
    '' | *[!0-9]*) echo "usage: scripts/fuzz.sh [SECONDS [TARGET...]]" >&2; exit 2 ;;
esac
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- gguf safetensors config template tokenizer_json processor

host=$(rustc +nightly -vV | sed -n 's/^host: //p')
if [ -z "$host" ]; then
    echo "fuzzing needs a nightly toolchain: rustup toolchain install nightly" >&2
    exit 1
fi

# What cargo-fuzz sets, but for AddressSanitizer: what runs here is safe code. With --target the
# flags leave build scripts and macros alone.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares ${RUSTFLAGS:-}"
export RUSTFLAGS CARGO_TARGET_DIR=target
cargo +nightly build --target "$host" --bins

status=0
for target in "$@"; do
    binary=target/$host/debug/$target
    if [ ! -x "$binary" ]; then
        echo "there is no fuzz target $target" >&2
        exit 2
    fi
    corpus=corpus/$target
    mkdir -p "$corpus" "artifacts/$target"
    log=target/$target.log
    if ! PHI3_FUZZ_SEEDS=$corpus "$binary" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        echo "$target cannot write its seeds" >&2
        exit 1
    fi
    # Long enough for a tokenizer with vocabulary or a model of one layer.
    case $target in
        gguf | tokenizer_json) max_len=32768 ;;
        config) max_len=2048 ;;
        *) max_len=8192 ;;
    esac
    echo "== $target, $seconds seconds"
    if "$binary" "$corpus" -max_total_time="$seconds" -max_len=$max_len -rss_limit_mb=2048 \
        -timeout=10 -use_value_profile=1 -print_final_stats=1 "-dict=dictionaries/$target.dict" \
        -artifact_prefix="artifacts/$target/" >"$log" 2>&1; then
        grep -E '^#[0-9]+.*DONE|^stat::(number_of_executed_units|peak_rss_mb|slowest_unit_time_sec)' "$log"
    else
        status=1
        tail -n 30 "$log" >&2
        echo "$target found something: see fuzz/$log and fuzz/artifacts/$target" >&2
    fi
done
exit $status
