# Sourced by the scripts beside it: finds cargo, installs what is missing. Needs bash 3.2 or later.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

have() { command -v "$1" >/dev/null 2>&1; }

die() {
  printf '%s\n' "$@" >&2
  exit 1
}

# install_packages PACKAGE...: from Debian's or Ubuntu's index; elsewhere, says what to install.
install_packages() {
  have apt-get || die "Please install what Debian calls: $*"
  local sudo=""
  if [ "$(id -u)" != 0 ]; then
    have sudo || die "Please install, as root: apt-get install $*"
    sudo=sudo
  fi
  echo "Installing $* ..." >&2
  export DEBIAN_FRONTEND=noninteractive
  # A stale or missing package list is the usual reason for the first try to fail.
  $sudo apt-get install -qq -y --no-install-recommends "$@" </dev/null >&2 ||
    { $sudo apt-get update -qq >&2 &&
      $sudo apt-get install -qq -y --no-install-recommends "$@" </dev/null >&2; } ||
    die "apt-get could not install $*; its message is above"
}

# skip WHY: ends a check for which this machine is not set up. In CI, where each must run, it fails.
skip() {
  [ "${CI:-}" != true ] || die "$1"
  echo "skipped: $1"
  exit 0
}

# debian_packages PACKAGE...: installs what is missing, but nothing that takes other packages' place;
# skips the check where that is not possible.
debian_packages() {
  local package missing=""
  have dpkg-query || skip "it needs Debian's packages $*"
  for package in "$@"; do
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
      missing="$missing $package"
  done
  # The packages' names hold no blanks.
  if [ -n "$missing" ]; then
    (install_packages --no-remove $missing) || skip "it needs the packages$missing"
  fi
  # A package list from before Debian's last update of the compiler names one that is too old.
  case " $* " in
    *" rustc-web "*)
      recent_rustc_web || (apt_get update -qq && install_packages --no-remove "$@") >&2
      recent_rustc_web || skip "it needs a rustc-web of version $(rust_version) or later"
      ;;
  esac
}

# rust_version: the oldest compiler that the workspace allows.
rust_version() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml"; }

recent_rustc_web() {
  local oldest
  oldest=$(printf '%s\n' "$(rust_version)" "$(/usr/bin/rustc --version | cut -d' ' -f2)" | sort -V | head -n 1)
  [ "$oldest" = "$(rust_version)" ]
}

# apt_get ARGUMENT...: as root.
apt_get() {
  if [ "$(id -u)" = 0 ]; then
    apt-get "$@"
  else
    sudo apt-get "$@"
  fi
}

# need_rust [COMPONENT...]: cargo, a linker, and components of the toolchain such as clippy.
need_rust() {
  if ! have cargo && [ -f "${CARGO_HOME:-$HOME/.cargo}/env" ]; then
    . "${CARGO_HOME:-$HOME/.cargo}/env"
  fi
  have cargo || die "cargo is missing; install Rust as https://rustup.rs says, then run this again"
  if ! have cc; then
    [ "$(uname)" != Darwin ] || die "A linker is missing; run: xcode-select --install"
    install_packages gcc libc6-dev
  fi
  local component
  for component in "$@"; do
    case $component in
      clippy) cargo clippy --version >/dev/null 2>&1 ;;
      rustfmt) cargo fmt --version >/dev/null 2>&1 ;;
    esac || {
      have rustup || die "cargo's component $component is missing, and rustup to add it"
      rustup component add "$component" >&2
    }
  done
}

# need_python_venv FOLDER: a virtual environment with pip.
need_python_venv() {
  "$1/bin/python" -m pip --version >/dev/null 2>&1 && return
  rm -rf "$1"
  have python3 || install_packages python3 python3-venv
  # Debian's python3 alone cannot put pip into an environment.
  python3 -m venv "$1" >/dev/null 2>&1 || {
    install_packages python3-venv
    rm -rf "$1"
    python3 -m venv "$1"
  }
}

# converted_demo_model GGUF f32|f16|bf16: prints the Hugging Face folder made of it, made on the
# first call.
converted_demo_model() {
  local folder=${1%.Q4_1.gguf}-$2
  if [ ! -d "$folder" ]; then
    .demo/venv/bin/python -m pip install --quiet --disable-pip-version-check \
      --requirement scripts/demo-requirements.txt >&2
    .demo/venv/bin/python scripts/convert_smollm2.py "$1" "$folder" --dtype "$2" >&2
  fi
  echo "$folder"
}
