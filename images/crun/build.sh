#!/usr/bin/env bash
# Builds crun as one static binary, without systemd, from the distribution's source package and its patches.
#
# Usage: images/crun/build.sh     -> build/crun
#
# Why static: under emulation the dynamic loader costs 80 to 90 ms on every create, start and exec.
# The source is fetched through a private apt configuration; the host's own is not touched. Needs the packages marked
# "crun" in tools/packages.txt. If there is no source to be had, exits with status 3 and leaves build/crun alone
# (the initramfs then carries the distribution's crun and its libraries). FORCE=1 builds again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../lib.sh"

work=$ROOT/build/work/crun
result=$ROOT/build/crun
stamp=$work/.recipe

candidate=$(apt-cache policy crun | sed -n 's/^ *Candidate: //p')
if [ -z "$candidate" ] || [ "$candidate" = "(none)" ]; then
    need_package_lists
    candidate=$(apt-cache policy crun | sed -n 's/^ *Candidate: //p')
fi
if [ -z "$candidate" ] || [ "$candidate" = "(none)" ]; then
    say "apt knows no crun"
    exit 3
fi

recipe=$candidate-$(sha256sum <"$here/build.sh" | cut -d' ' -f1)
if [ -z "${FORCE:-}" ] && [ -x "$result" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$recipe" ]; then
    say "static crun $candidate is up to date"
    exit 0
fi

# The archives that offer this very version, as "URL suite component", turned into deb-src lines.
rm -rf "$work"
mkdir -p "$work/lists/partial" "$work/static"
keyring=
for file in /usr/share/keyrings/{debian,ubuntu}-archive-keyring.gpg; do
    if [ -e "$file" ]; then keyring="[signed-by=$file] "; fi
done
apt-cache policy crun | awk -v version="$candidate" -v options="$keyring" '
    { sub(/^ *\*\*\* /, "") }
    NF == 2 && $2 ~ /^[0-9]+$/ { current = $1; next }
    current == version && $1 ~ /^[0-9]+$/ && $2 ~ /^https?:/ {
        split($3, place, "/")
        print "deb-src " options $2, place[1], place[2]
    }' >"$work/sources.list"

private_apt() {
    apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$work/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
        -o APT::Sandbox::User=root "$@"
}

say "fetching the source of crun $candidate"
if ! [ -s "$work/sources.list" ] || ! (cd "$work" && private_apt update && private_apt source "crun=$candidate") >"$work/fetch.log" 2>&1; then
    say "no source package for crun $candidate (see $work/fetch.log)"
    exit 3
fi
cd "$(find "$work" -mindepth 1 -maxdepth 1 -type d -name 'crun-*' | head -n 1)"

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
