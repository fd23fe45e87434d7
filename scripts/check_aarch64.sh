#!/usr/bin/env bash
# Runs phi3-kernels' tests for 64-bit ARM in an emulator, QEMU, as three processors: a Cortex-A53
# without dot-product instructions, which faults at any instruction that was not detected; a
# Cortex-A76 with them; and one with all that QEMU knows, among it matrix products. Says nothing
# about speed. CPUS="cortex-a53" runs it as that one alone.
#
# Needs Debian, whose packages it installs: a compiler whose standard library comes for ARM too,
# which is only unpacked, a linker and QEMU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"
need_rust
target=aarch64-unknown-linux-gnu
folder=$root/target/check-aarch64

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || skip "it is set up for Linux on x86-64 alone"
debian_packages rustc-web gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

# unpacked_library SYSROOT: the standard library for ARM beside that of this machine. A package index
# of its own, so that the system's list of architectures stays as it is.
unpacked_library() {
  local version apt=$folder/apt
  version=$(dpkg-query --show --showformat='${Version}' rustc-web)
  [ "$(cat "$1/version" 2>/dev/null)" != "$version" ] || return 0
  rm -rf "$1" "$apt"
  mkdir -p "$1/lib/rustlib" "$apt/lists/partial" "$apt/cache/archives/partial"
  cat >"$apt/apt.conf" <<END
APT::Architectures { "amd64"; "arm64"; };
Dir::State::Lists "$apt/lists";
Dir::Cache "$apt/cache";
END
  (
    cd "$apt"
    export APT_CONFIG=$apt/apt.conf
    apt-get update -qq
    # As root, since that user reads this folder and apt's own user may not.
    apt-get download -qq -o APT::Sandbox::User=root "libstd-rust-web-dev:arm64=$version"
  ) >&2
  dpkg-deb --extract "$apt"/*.deb "$apt/library"
  mv "$apt/library/usr/lib/rustlib/$target" "$1/lib/rustlib/"
  ln -s /usr/lib/rustlib/x86_64-unknown-linux-gnu "$1/lib/rustlib/"
  rm -rf "$apt"
  echo "$version" >"$1/version"
}
unpacked_library "$folder/sysroot"

export RUSTC=/usr/bin/rustc RUSTFLAGS="--sysroot $folder/sysroot -D warnings"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
# An emulator is some twenty times slower than the processor.
export PROPTEST_CASES=${PROPTEST_CASES:-24}
for cpu in ${CPUS:-cortex-a53 cortex-a76 max}; do
  echo "-- as $cpu"
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu $cpu -L /usr/aarch64-linux-gnu"
  cargo test ${CI:+--locked} --quiet -p phi3-kernels --lib --tests --target "$target" \
    --target-dir "$folder" "$@"
done
