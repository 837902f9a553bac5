#!/usr/bin/env bash
# Builds crun as one static binary, without systemd, from the distribution's source package and its patches.
#
# Usage: images/crun/build.sh     -> build/crun
#
# Why static: under emulation the dynamic loader costs 80 to 90 ms on every create, start and exec.
# Needs the packages marked "crun" in tools/packages.txt. If there is no source to be had, exits with status 3 and leaves build/crun alone
# (the initramfs then carries the distribution's crun and its libraries). FORCE=1 builds again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../lib.sh"

work=$ROOT/build/work/crun
result=$ROOT/build/crun
stamp=$work/.recipe

candidate=$(source_version crun)
if [ -z "$candidate" ]; then
    say "apt knows no crun"
    exit 3
fi

recipe=$candidate-$(sha256sum <"$here/build.sh" | cut -d' ' -f1)
if [ -z "${FORCE:-}" ] && [ -x "$result" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$recipe" ]; then
    say "static crun $candidate is up to date"
    exit 0
fi

say "fetching the source of crun $candidate"
rm -rf "$work"
mkdir -p "$work/static"
if ! source_package crun "$candidate" "$work"; then
    say "no source package for crun $candidate (see $work/fetch.log)"
    exit 3
fi
cd "$work"/crun-*/

# Debian names yajl's static library libyajl_s.a; give it the name the linker looks for.
libraries=$(dirname "$(cc -print-file-name=libcap.a)")
for name in libyajl.a libyajl_s.a; do
    if [ -e "$libraries/$name" ]; then ln -sf "$libraries/$name" "$work/static/libyajl.a"; fi
done

say "compiling"
{
    if [ ! -x configure ]; then ./autogen.sh; fi
    # Without gcrypt, which only names cached seccomp programs: it adds 1.4 MB and its own start-up.
    ./configure --disable-systemd --disable-criu --disable-dl --enable-static --disable-shared \
        ac_cv_search_gcry_check_version=no \
        CFLAGS="-O2 -fstack-protector-strong -D_FORTIFY_SOURCE=2" LDFLAGS="-L$work/static"
    # These are prerequisites that a parallel build of the one target does not know of.
    make git-version.h
    make generate-signals.c generate-mount_flags.c || true
    # Its own dependencies do not say that these generated headers come first: with several jobs it is a matter of luck.
    make -j"$(nproc)" -C libocispec
    make -j"$(nproc)" crun LDFLAGS="-all-static -L$work/static"
} >"$work/build.log" 2>&1 || {
    tail -n 20 "$work/build.log" >&2
    die "crun does not build; the whole log is $work/build.log"
}
strip -s crun
# Asked of the file itself: a static program has no interpreter.
if readelf -lW crun | grep -q INTERP; then die "the crun built is not static"; fi
./crun --version >/dev/null
install_file crun "$result"
chmod 0755 "$result"
put_file "$stamp" "$recipe"
say "$("$result" --version | head -n 1), static, $(stat -c %s "$result") bytes"
