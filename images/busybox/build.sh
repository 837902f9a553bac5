#!/usr/bin/env bash
# Builds BusyBox as its authors configure it, static, from the distribution's source package.
#
# Usage: images/busybox/build.sh     -> build/busybox
#
# The distribution's own lacks applets that images of BusyBox have elsewhere (pgrep, ipcs), and its shell runs applets
# without looking for their files. cri-tools' conformance suite relies on both. FORCE=1 builds again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../lib.sh"

work=$ROOT/build/work/busybox
result=$ROOT/build/busybox
version=$(source_version busybox)
[ -n "$version" ] || die "apt knows no busybox"
if [ -z "${FORCE:-}" ] && [ -x "$result" ] && [ "$(cat "$work/.built" 2>/dev/null)" = "$version" ]; then
    say "busybox $version is up to date"
    exit 0
fi

say "fetching the source of busybox $version"
rm -rf "$work"
mkdir -p "$work"
source_package busybox "$version" "$work" || die "no source package for busybox $version; see $work/fetch.log"
cd "$work"/busybox-*/
say "compiling"
{
    make defconfig
    # tc needs headers that kernels no longer have.
    sed -i -e 's/^# CONFIG_STATIC is not set/CONFIG_STATIC=y/' -e 's/^CONFIG_TC=y/# CONFIG_TC is not set/' .config
    yes '' | make oldconfig || true
    make -j"$(nproc)" busybox
} >"$work/build.log" 2>&1 || {
    tail -n 20 "$work/build.log" >&2
    die "busybox does not build; the whole log is $work/build.log"
}
if readelf -lW busybox | grep -q INTERP; then die "the busybox built is not static"; fi
install_file busybox "$result"
chmod 0755 "$result"
put_file "$work/.built" "$version"
say "$("$result" | head -n 1)"
