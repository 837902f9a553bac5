# Shared by the recipes under images/; sourced, never run.
# shellcheck shell=bash disable=SC2034

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s: %s\n' "$(basename "$(dirname "$0")")" "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

# What differs between architectures, in one table.
# Sets KERNEL_ARCH (the kernel's own name), KERNEL_TARGET, KERNEL_IMAGE, DEB_ARCH, RUST_TARGET and CONSOLE.
# shellcheck disable=SC2034
target_kernel() {
    case $1 in
    x86_64)
        KERNEL_ARCH=x86_64 KERNEL_TARGET=bzImage KERNEL_IMAGE=arch/x86/boot/bzImage
        DEB_ARCH=amd64 RUST_TARGET=x86_64-unknown-linux-gnu CONSOLE=ttyS0 QEMU=qemu-system-x86_64
        ;;
    aarch64)
        KERNEL_ARCH=arm64 KERNEL_TARGET=Image KERNEL_IMAGE=arch/arm64/boot/Image
        DEB_ARCH=arm64 RUST_TARGET=aarch64-unknown-linux-gnu CONSOLE=ttyAMA0 QEMU=qemu-system-aarch64
        ;;
    *) die "no recipe for the architecture $1 (known: x86_64, aarch64)" ;;
    esac
}

# Fetches apt's package lists, once per run, when they are missing or a name was not found in them.
need_package_lists() {
    say "updating apt's package lists"
    apt-get update -qq
}

# fetch_deb PACKAGE DIRECTORY: downloads a binary package (does not install it) and prints the file's path.
# A file that is there already is used again if it is the version apt would choose.
fetch_deb() {
    local package=$1 directory=$2 candidate file
    candidate=$(apt-cache policy "$package" | sed -n 's/^ *Candidate: //p')
    if [ -z "$candidate" ] || [ "$candidate" = "(none)" ]; then
        need_package_lists
        candidate=$(apt-cache policy "$package" | sed -n 's/^ *Candidate: //p')
    fi
    if [ -z "$candidate" ] || [ "$candidate" = "(none)" ]; then die "apt knows no package $package"; fi
    # apt writes the version's colon as %3a in file names.
    file=$(find "$directory" -maxdepth 1 -name "${package}_${candidate//:/%3a}_*.deb" -print -quit)
    if [ -z "$file" ]; then
        say "downloading $package $candidate"
        (cd "$directory" && apt-get download -qq -o APT::Sandbox::User=root "$package" >&2)
        file=$(find "$directory" -maxdepth 1 -name "${package}_${candidate//:/%3a}_*.deb" -print -quit)
    fi
    [ -n "$file" ] || die "apt-get download left no file for $package"
    printf '%s\n' "$file"
}

# put_file PATH TEXT: writes a line to a temporary name, then renames it, so a reader never sees half a file.
put_file() {
    printf '%s\n' "$2" >"$1.tmp.$$"
    mv -f "$1.tmp.$$" "$1"
}

# install_file SOURCE PATH: copies the same way.
install_file() {
    cp "$1" "$2.tmp.$$"
    mv -f "$2.tmp.$$" "$2"
}

# source_version PACKAGE: prints the version apt would install; nothing when it knows none.
source_version() {
    local candidate
    candidate=$(apt-cache policy "$1" | sed -n 's/^ *Candidate: //p')
    if [ -z "$candidate" ] || [ "$candidate" = "(none)" ]; then
        need_package_lists
        candidate=$(apt-cache policy "$1" | sed -n 's/^ *Candidate: //p')
    fi
    if [ "$candidate" != "(none)" ]; then echo "$candidate"; fi
}

# source_package PACKAGE VERSION WORK: unpacks a source package, patched, into WORK/PACKAGE-*. The archives that offer
# the version are asked through a private apt configuration; the host's own is not touched. WORK/fetch.log has the
# words of apt.
source_package() {
    local keyring='' file
    mkdir -p "$3/lists/partial"
    for file in /usr/share/keyrings/{debian,ubuntu}-archive-keyring.gpg; do
        if [ -e "$file" ]; then keyring="[signed-by=$file] "; fi
    done
    apt-cache policy "$1" | awk -v version="$2" -v options="$keyring" '
        { sub(/^ *\*\*\* /, "") }
        NF == 2 && $2 ~ /^[0-9]+$/ { current = $1; next }
        current == version && $1 ~ /^[0-9]+$/ && $2 ~ /^https?:/ {
            split($3, place, "/")
            print "deb-src " options $2, place[1], place[2]
        }' >"$3/sources.list"
    [ -s "$3/sources.list" ] || return 1
    (cd "$3" && private_apt "$3" update && private_apt "$3" source "$1=${2%+b[0-9]}") >"$3/fetch.log" 2>&1
}

private_apt() {
    local work=$1
    shift
    apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$work/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
        -o APT::Sandbox::User=root "$@"
}
