#!/usr/bin/env bash
# Runs phi3-kernels' tests under AddressSanitizer, which finds reads and writes outside of what was
# allocated, for each backend that this processor has. Needs a nightly toolchain. Not part of CI.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"
need_rust
target=$(rustc +nightly -vV 2>/dev/null | sed -n 's/^host: //p')
[ -n "$target" ] || die "AddressSanitizer needs a nightly toolchain: rustup toolchain install nightly"

# With --target the flag leaves build scripts and macros alone.
export RUSTFLAGS="-Z sanitizer=address"
cargo +nightly test -p phi3-kernels --lib --tests --target "$target" \
  --target-dir "$root/target/check-asan" "$@"
