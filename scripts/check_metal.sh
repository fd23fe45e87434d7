#!/usr/bin/env bash
# Type-checks what the feature `metal` turns on, without a Mac: for aarch64-apple-darwin, whose
# standard library rustup brings. Finds Rust that does not compile against candle's Metal device;
# compiles no shader, links nothing, and says nothing about results or speed on a GPU. Not part of
# CI.
#
# It looks at phi3-nn and the models, where the feature means something. The crates above forward it
# (a test sees to that), but need a C compiler for macOS on the way.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"
need_rust
target=aarch64-apple-darwin
have rustup || die "rustup is missing, which brings the standard library of $target"
rustup target add "$target"

packages=(-p phi3-nn)
for model in models/*/; do packages+=(-p "$(basename "$model")"); done

# Optimizing macros and build scripts, as the tests need it of dependencies, would only cost.
RUSTFLAGS="-D warnings" cargo check "${packages[@]}" --features metal --target "$target" \
  --target-dir "${CARGO_TARGET_DIR:-target}/check-metal" \
  --config 'profile.dev.package."*".opt-level=0' "$@"
