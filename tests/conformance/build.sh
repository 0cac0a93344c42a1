#!/bin/sh
# Builds what the containerd tests need, once, into a cache outside the repository, and prints the directory:
#   bin/containerd, bin/ctr, bin/containerd-shim-runc-v2   the containerd 2.x pinned in go.mod
#   bin/snapshotter.test                                  containerd's own snapshotter suite, against a socket
# Everything comes through the Go module proxy, checked by go.sum. A machine without a recent Go gets the toolchain from
# the same proxy. Running it again when nothing changed takes no time.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cache=${SHOAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/shoal}
stamp=$(cat "$here/go.mod" "$here/go.sum" "$here"/*.go "$here/build.sh" "$here/go.sh" | sha256sum | cut -c1-16)
out=$cache/containerd-$stamp
if [ -e "$out/complete" ]; then
    echo "$out"
    exit 0
fi

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
if [ -e "$out/complete" ]; then  # another run made it meanwhile
    echo "$out"
    exit 0
fi

echo "building containerd and its conformance suite (minutes, once)" >&2
rm -rf "$out.part" && mkdir -p "$out.part/bin"
cd "$here"
go=$(./go.sh)
export CGO_ENABLED=0 GOFLAGS=-mod=readonly
module=github.com/containerd/containerd/v2
version=$("$go" list -m -f '{{.Version}}' $module)
"$go" build -trimpath -tags no_btrfs,no_zfs,no_devmapper,no_tracing -ldflags "-s -w -X $module/version.Version=$version" \
    -o "$out.part/bin/" $module/cmd/containerd $module/cmd/ctr $module/cmd/containerd-shim-runc-v2 >&2
"$go" test -trimpath -c -o "$out.part/bin/snapshotter.test" . >&2
rm -rf "$out" && mv "$out.part" "$out"
touch "$out/complete"
echo "$out"
