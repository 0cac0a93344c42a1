#!/bin/sh
# Prints the path of a Go that can build the version named in go.mod: the machine's own if it is recent, else the toolchain
# from the Go module proxy, fetched once into the cache and checked.
set -eu
cache=${SHOAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/shoal}
want_go=1.26.6
# SHA-256 of golang.org/toolchain@v0.0.1-go1.26.6.linux-<arch>.zip
sum_amd64=6347bdd1fdc7c659d955d8034cd82ec23a5b776bf48b9dfc3a75088d2dacfe0e
sum_arm64=a2313f15b100a99fd202aaf11adce2cbeec3c684317eef414fc97054dc644d11

recent() {  # is this a Go that can switch to the version named in go.mod by itself (1.21 and later)?
    [ -x "$1" ] && "$1" version 2>/dev/null | grep -Eq 'go1\.(2[1-9]|[3-9][0-9])'
}

go=$(command -v go || true)
if ! recent "${go:-/nonexistent}"; then
    go=/usr/local/go/bin/go
fi
if ! recent "$go"; then
    case $(uname -m) in
        x86_64) arch=amd64 sum=$sum_amd64 ;;
        aarch64) arch=arm64 sum=$sum_arm64 ;;
        *) echo "no Go toolchain for $(uname -m): install Go $want_go or newer" >&2; exit 1 ;;
    esac
    name=v0.0.1-go$want_go.linux-$arch
    go=$cache/go/golang.org/toolchain@$name/bin/go
    if [ ! -x "$go" ]; then
        echo "fetching Go $want_go" >&2
        mkdir -p "$cache/go"
        base=${GOPROXY:-https://proxy.golang.org}
        curl -fsSL --retry 3 -o "$cache/go/$name.zip" "${base%%,*}/golang.org/toolchain/@v/$name.zip"
        echo "$sum  $cache/go/$name.zip" | sha256sum -c --quiet - >&2
        python3 -m zipfile -e "$cache/go/$name.zip" "$cache/go"
        chmod -R u+x "$cache/go/golang.org/toolchain@$name/bin" "$cache/go/golang.org/toolchain@$name/pkg/tool"
        rm -f "$cache/go/$name.zip"
    fi
fi
echo "$go"
