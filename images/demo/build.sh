#!/usr/bin/env bash
# Makes demonstration images from real Debian packages, as OCI archives build/demo-images/NAME.tar, each named
# demo.local/NAME:1.
#
# Usage: images/demo/build.sh [nginx|redis|python|busybox ...]     (all by default; what is there already is kept)
#
# nginx, redis and python lie on one base layer, a minimal Debian that is made once and kept in build/work/demo; busybox
# is a static BusyBox and nothing else.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../lib.sh"

out=$ROOT/build/demo-images
cache=$ROOT/build/work/demo
layout=$cache/oci
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p "$out" "$cache"
exec {lock}>"$cache/lock"
flock "$lock" # a second build would take the base away from under this one
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# tidy ROOTFS: removes what an image has no use for and what differs from one run to the next.
tidy() {
    rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/usr/share/doc/* "$1"/var/log/apt "$1"/var/log/dpkg.log \
        "$1"/var/cache/ldconfig/aux-cache "$1"/etc/resolv.conf
    find "$1/dev" "$1/tmp" -mindepth 1 -delete
}

# commit IMAGE BUNDLE: writes a bundle's root file system as a layer on top of the image's.
commit() {
    umoci repack --image "$layout:$1" "$2"
    umoci config --image "$layout:$1" --config.env "PATH=$path"
}

# The base, once: later images must lie on the very same layer, or a host would store it several times.
need_base() {
    [ ! -s "$cache/base" ] || return 0
    say "building the base image, Debian $suite"
    rm -rf "$layout"
    mmdebstrap --quiet --variant=minbase "$suite" "$work/base" </dev/null
    tidy "$work/base"
    umoci init --layout "$layout"
    umoci new --image "$layout:base"
    umoci unpack --image "$layout:base" "$work/base-bundle"
    rmdir "$work/base-bundle/rootfs"
    mv "$work/base" "$work/base-bundle/rootfs"
    commit base "$work/base-bundle"
    put_file "$cache/base" "$(skopeo inspect --format '{{index .Layers 0}}' "oci:$layout:base")"
}

# install_package ROOTFS PACKAGE: apt in the root file system, in a mount namespace whose mounts end with it.
install_package() {
    apt-config dump --format '%F "%v";%n' Acquire >"$1/tmp/apt.conf" # proxies of the host
    cp -L /etc/resolv.conf "$1/etc/resolv.conf"
    # shellcheck disable=SC2016
    unshare --mount --pid --fork --kill-child sh -euc '
        mount -t proc proc "$1/proc"
        mount --rbind /dev "$1/dev"
        printf "#!/bin/sh\nexit 101\n" >"$1/usr/sbin/policy-rc.d"
        chmod 755 "$1/usr/sbin/policy-rc.d"
        export APT_CONFIG=/tmp/apt.conf DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
        chroot "$1" apt-get update -qq
        chroot "$1" apt-get install -y -qq --no-install-recommends "$2" >/dev/null
        rm "$1/usr/sbin/policy-rc.d"
    ' sh "$1" "$2" </dev/null
    tidy "$1"
}

# archive NAME LAYOUT IMAGE: puts the finished image where it is used, whole or not at all.
archive() {
    skopeo copy --quiet --insecure-policy "oci:$2:$3" "oci-archive:$work/$1.tar:demo.local/$1:1"
    mv "$work/$1.tar" "$out/$1.tar"
}

# package_image NAME PACKAGE UMOCI-CONFIG…: an image with the package and what it needs, on the base.
package_image() {
    local name=$1 package=$2 below
    shift 2
    need_base
    if [ -s "$out/$name.tar" ]; then
        below=$(skopeo inspect --format '{{index .Layers 0}}' "oci-archive:$out/$name.tar")
        [ "$below" != "$(cat "$cache/base")" ] || return 0
    fi
    say "building $name from Debian's $package"
    umoci tag --image "$layout:base" "$name"
    umoci unpack --image "$layout:$name" "$work/$name"
    install_package "$work/$name/rootfs" "$package"
    if [ "$name" = nginx ]; then
        ln -sf /dev/stdout "$work/nginx/rootfs/var/log/nginx/access.log"
        ln -sf /dev/stderr "$work/nginx/rootfs/var/log/nginx/error.log"
    fi
    commit "$name" "$work/$name"
    umoci config --image "$layout:$name" "$@"
    archive "$name" "$layout" "$name"
}

busybox_image() {
    local root=$work/busybox/rootfs applet
    [ ! -s "$out/busybox.tar" ] || return 0
    say "building busybox from Debian's busybox-static"
    umoci init --layout "$work/oci"
    umoci new --image "$work/oci:busybox"
    umoci unpack --image "$work/oci:busybox" "$work/busybox"
    mkdir -p "$root/bin" "$root/etc" "$root/root" "$root/var"
    mkdir -m 1777 "$root/tmp"
    cp "$(command -v busybox)" "$root/bin/busybox"
    if readelf -lW "$root/bin/busybox" | grep -q INTERP; then die "busybox is not static; install busybox-static"; fi
    for applet in $(busybox --list); do
        [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
    done
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n' >"$root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
    umoci repack --image "$work/oci:busybox" "$work/busybox"
    umoci config --image "$work/oci:busybox" --config.cmd sh --config.env PATH=/bin
    archive busybox "$work/oci" busybox
}

[ $# -gt 0 ] || set -- nginx redis python busybox
for name in "$@"; do
    case $name in
    nginx) package_image nginx nginx-light --config.cmd nginx --config.cmd -g --config.cmd 'daemon off;' --config.stopsignal SIGQUIT --config.exposedports 80/tcp ;;
    redis) package_image redis redis-server --config.cmd redis-server --config.cmd --protected-mode --config.cmd no --config.user redis --config.exposedports 6379/tcp ;;
    python) package_image python python3-minimal --config.cmd python3 ;;
    busybox) busybox_image ;;
    *) die "no recipe for the image $name (known: nginx, redis, python, busybox)" ;;
    esac
done
