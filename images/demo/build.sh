#!/usr/bin/env bash
# Makes demonstration images from real Debian packages, as OCI archives under build/demo-images/.
#
# Usage: images/demo/build.sh [nginx|redis|python ...]     (all by default; what is there already is kept)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../lib.sh"

out=$ROOT/build/demo-images
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
mkdir -p "$out"

# build NAME PACKAGE UMOCI-CONFIG…: one image with the package and what it needs.
build() {
    local name=$1 package=$2 work
    shift 2
    [ ! -s "$out/$name.tar" ] || return 0
    say "building $name from Debian's $package"
    work=$(mktemp -d)
    mmdebstrap --quiet --variant=minbase --include="$package" "$suite" "$work/rootfs" </dev/null
    rm -rf "$work/rootfs/var/cache/apt" "$work/rootfs/var/lib/apt/lists" "$work/rootfs/usr/share/doc"
    find "$work/rootfs/dev" -mindepth 1 -delete
    if [ "$name" = nginx ]; then
        ln -sf /dev/stdout "$work/rootfs/var/log/nginx/access.log"
        ln -sf /dev/stderr "$work/rootfs/var/log/nginx/error.log"
    fi
    umoci init --layout "$work/oci"
    umoci new --image "$work/oci:1"
    umoci unpack --image "$work/oci:1" "$work/bundle"
    rmdir "$work/bundle/rootfs"
    mv "$work/rootfs" "$work/bundle/rootfs"
    umoci repack --image "$work/oci:1" "$work/bundle"
    umoci config --image "$work/oci:1" "$@"
    skopeo copy --quiet --insecure-policy "oci:$work/oci:1" "oci-archive:$work/$name.tar:demo.local/$name:1"
    mv "$work/$name.tar" "$out/$name.tar"
    rm -rf "$work"
}

[ $# -gt 0 ] || set -- nginx redis python
for name in "$@"; do
    case $name in
    nginx) build nginx nginx-light --config.cmd nginx --config.cmd -g --config.cmd 'daemon off;' --config.stopsignal SIGQUIT --config.exposedports 80/tcp ;;
    redis) build redis redis-server --config.cmd redis-server --config.cmd --protected-mode --config.cmd no --config.user redis --config.exposedports 6379/tcp ;;
    python) build python python3-minimal --config.cmd python3 ;;
    *) die "no recipe for the image $name (known: nginx, redis, python)" ;;
    esac
done
