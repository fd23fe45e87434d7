#!/usr/bin/env bash
# Type-checks what the feature `cuda` turns on, without a CUDA toolkit or a GPU: a stand-in for nvcc
# makes empty files of the kernels. Finds Rust that does not compile against candle's CUDA device;
# says nothing about results or speed on a GPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"
need_rust

# A real toolkit must not be found, neither by PATH nor by the variables that its users set.
unset CUDA_HOME CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR CUDNN_LIB NVCC_CCBIN CUDARC_CUDA_VERSION
export PATH=$root/scripts/stub-cuda:$PATH
export NVCC=$root/scripts/stub-cuda/nvcc CUDA_COMPUTE_CAP=80 RUSTFLAGS="-D warnings"

# Its own folder, so that no real build ever takes the empty kernels for compiled ones. Nothing runs
# but build scripts and macros, so optimizing dependencies, as the tests need it, would only cost.
cargo check ${CI:+--locked} -p phi3 -p phi3-cli --features cuda \
  --target-dir "${CARGO_TARGET_DIR:-target}/check-cuda" \
  --config 'profile.dev.package."*".opt-level=0' "$@"
