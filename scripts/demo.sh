#!/usr/bin/env bash
# A chat in the terminal with a small trained model, from nothing but a Rust toolchain:
#
#     scripts/demo.sh                          # chat
#     scripts/demo.sh --prompt "Why is it so?" # one answer
#     scripts/demo.sh --f16                    # the same model as an f16 Hugging Face folder
#
# Other flags go to the binary (`phi3 chat --help`). Without a terminal it answers one question.
# Everything that it fetches or makes lies in .demo/ and target/.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local f16=false prompt="" flags=()
  while (($#)); do
    case $1 in
      -h | --help)
        sed -n '2,9s/^# \{0,1\}//p' "$root/scripts/demo.sh"
        exit
        ;;
      --f16) f16=true ;;
      --prompt)
        [ $# -ge 2 ] || die "--prompt needs a text"
        prompt=$2
        shift
        ;;
      --prompt=*) prompt=${1#*=} ;;
      *) flags+=("$1") ;;
    esac
    shift
  done
  if [ -z "$prompt" ] && ! [ -t 0 ]; then
    prompt="What is the capital of France?"
  fi

  cd "$root"
  need_rust
  need_python_venv .demo/venv
  local model
  model=$(.demo/venv/bin/python scripts/fetch_demo_model.py .demo)
  if $f16; then
    model=$(converted_demo_model "$model" f16)
  fi
  echo "Building phi3 with optimizations; the first time takes some minutes ..." >&2
  cargo build --release --locked -p phi3-cli </dev/null

  cat >&2 <<'TEXT'

This is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) in Phi-3 shape: its layers are exactly
Phi-3's once fused, so the same code runs it, but it is a very small model with a small model's
answers. The real checkpoints run the same way, from the hub (7.6 GB for this one):

    phi3 chat --model microsoft/Phi-3-mini-4k-instruct

TEXT
  local phi3=${CARGO_TARGET_DIR:-target}/release/phi3
  # An empty array counts as unset in bash before 4.4.
  if [ -n "$prompt" ]; then
    exec "$phi3" generate --model "$model" --prompt "$prompt" ${flags[@]+"${flags[@]}"} </dev/null
  fi
  exec "$phi3" chat --model "$model" ${flags[@]+"${flags[@]}"}
}

main "$@"
