#!/bin/bash
# Everything a fresh Debian-like machine needs, as root. Quick when there is nothing left to do.
#
#   deploy/setup.sh          what Shoal, `make demo` and `make check` need; leaves .venv/bin/shoal
#   deploy/setup.sh test     that, and what only the tests need: judges of images, file systems; containerd 2.x
#                            and its conformance suite, built from source
#
# Nothing is taken from outside Debian's archive and PyPI, except, for the tests, Go and its modules. Python packages go into .venv, the
# tools that make it (uv) into .tools; the system's own Python is only read.
set -euo pipefail

cd "$(dirname "$0")/.."
tools=$PWD/.tools
uv_version=0.13.9     # reads this uv.lock (revision 5)

packages=(
  ca-certificates curl tar xz-utils zstd attr
  python3 python3-venv python3-dev gcc libc6-dev pkg-config make git
  libfuse3-dev fuse3          # pyfuse3 is compiled here
  libgmp-dev                  # fastecdsa (py-libp2p) is compiled where PyPI has no wheel for this Python
  containerd runc docker-registry
  erofs-utils                 # fsck.erofs, mkfs.erofs: the judges of our images
  iproute2 util-linux mount procps kmod
)

# skopeo, umoci and podman (some 140 MB) judge converted images, systemd-analyze the units; the mkfs make file systems of the tests' own:
# small ones that fill up, and one on which chunks share blocks.
test_packages=(skopeo umoci podman btrfs-progs e2fsprogs systemd)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

stamp_of() { cat deploy/setup.sh uv.lock pyproject.toml "$@" | sha256sum | cut -d' ' -f1; }

is_done() { [[ -e $tools/$1.stamp && $(cat "$tools/$1.stamp") == "$2" ]]; }

system_packages() {
  local package missing=()
  for package in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null) == ii* ]] || missing+=("$package")
  done
  (( ${#missing[@]} )) || return 0
  [[ $(id -u) == 0 ]] || die "these packages are missing and only root can install them: ${missing[*]}"
  say "installing ${missing[*]}"
  # docker-registry's package would start a public registry on port 5000: not what somebody wants who tries a demo. Nor has anybody
  # asked for podman's services.
  local policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\ncase $1 in docker-registry*|podman*) exit 101;; esac\nexit 0\n' >$policy
    chmod +x $policy
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  local package_services=()
  [[ -e /usr/bin/docker-registry ]] || package_services+=(docker-registry.service)
  [[ -e /usr/bin/podman ]] || package_services+=(podman.service podman.socket podman-restart.service podman-auto-update.timer)
  apt-get update -qq || say "apt-get update failed; trying with the lists that are there"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  if [[ -d /run/systemd/system ]]; then
    for package in "${package_services[@]}"; do
      systemctl disable --quiet "$package" 2>/dev/null || true
    done
  fi
  rm -f $policy
  trap - EXIT
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python_for_venv() {
  local candidate
  # A virtual environment that is there is kept; then the distribution's own Python, then any other on the PATH.
  for candidate in .venv/bin/python3 /usr/bin/python3 "$(command -v python3 || true)"; do
    if [[ -n $candidate && -x $candidate ]] && is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "no Python of 3.11 or newer; Debian 12 and Ubuntu 24.04 have one"
}

python_packages() {
  if [[ $("$tools/uv/bin/uv" --version 2>/dev/null) != "uv $uv_version"* ]]; then
    say "installing uv $uv_version into .tools"
    rm -rf "$tools/uv"
    "$(python_for_venv)" -m venv "$tools/uv"
    "$tools/uv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
  fi
  local python
  python=$(python_for_venv)
  [[ $python == .venv/* ]] && python=$PWD/.venv
  say "installing the locked Python packages into .venv"
  # System certificates: behind a company's proxy the bundled ones know nothing of it.
  env -u VIRTUAL_ENV UV_PYTHON_DOWNLOADS=never UV_PYTHON="$python" UV_SYSTEM_CERTS=true UV_NATIVE_TLS=true UV_LINK_MODE=copy \
    "$tools/uv/bin/uv" sync --frozen --quiet --compile-bytecode
  [[ -x .venv/bin/shoal ]] || die "uv sync left no .venv/bin/shoal"
}

# Python writes bytecode by itself only where PYTHONDONTWRITEBYTECODE is not set, as in many images, and never where it may not write.
# Without it every command compiles its modules anew.
our_bytecode() { .venv/bin/python -m compileall -q agent fsmount; }

setup_base() {
  local stamp
  stamp=$(stamp_of)
  if is_done setup "$stamp" && [[ -x .venv/bin/shoal ]]; then
    our_bytecode
    return
  fi
  system_packages "${packages[@]}"
  python_packages
  our_bytecode
  echo "$stamp" >"$tools/setup.stamp"
  say "ready: .venv/bin/shoal"
}

setup_test() {
  system_packages "${test_packages[@]}"
  # Each of these builds what its tests need (containerd 2.x, the Go toolchain for it) and is quick when that is there.
  local script
  for script in tests/*/build.sh; do
    [[ -e $script ]] || continue
    sh "$script" >/dev/null || die "$script failed"
  done
}

mkdir -p "$tools"
exec 9>>"$tools/setup.lock"   # two terminals, one set-up
flock 9
case ${1:-base} in
  base) setup_base ;;
  test) setup_base; setup_test ;;
  *) die "unknown part ${1@Q}; say nothing or: test" ;;
esac
