#!/usr/bin/env bash
# Runs phi3-kernels' tests for WebAssembly with vectors of 128 bits in Node, whose WASI lends them
# files and a clock. Says nothing about speed; browsers compile the same instructions.
#
# Needs Debian, whose packages it installs: a compiler, the sources of its standard library, which is
# built for WebAssembly, a C library and a linker.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"
need_rust
target=wasm32-wasip1
libc=/usr/lib/wasm32-wasi

[ "$(uname -s)" = Linux ] || skip "it is set up for Debian alone"
debian_packages rustc-web rust-web-src lld wasi-libc
have node || debian_packages nodejs

# Building the standard library is an unstable option, which a stable compiler takes this way.
export RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1
# What is undefined is imported: see run_wasi.mjs.
export RUSTFLAGS="-C target-feature=+simd128 -C linker=wasm-ld -C link-self-contained=no \
-C link-arg=$libc/crt1-command.o -L $libc -C link-arg=-lc -C link-arg=--allow-undefined -D warnings"
export CARGO_TARGET_WASM32_WASIP1_RUNNER="node --no-warnings \
--experimental-wasi-unstable-preview1 $root/scripts/run_wasi.mjs"
export PROPTEST_CASES=${PROPTEST_CASES:-64}
# The standard library and the test library are quicker built than optimized.
cargo test ${CI:+--locked} --quiet -p phi3-kernels --lib --tests --target "$target" \
  -Z build-std=std,panic_abort,test --config 'profile.dev.package."*".opt-level=1' \
  --target-dir "$root/target/check-wasm" "$@"
