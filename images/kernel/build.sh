#!/usr/bin/env bash
# Builds the minimal guest kernel from the distribution's linux-source package.
#
# Usage: images/kernel/build.sh [ARCH]     -> build/kernel/{vmlinuz,config,version}
#
# The source is fetched with apt-get download and unpacked; nothing is installed on the host. LINUX_SOURCE_DEB
# names a package file to use instead. Does nothing if the result is newer than its recipe; FORCE=1 builds anyway.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../lib.sh"

arch=${1:-$(uname -m)}
target_kernel "$arch"
out=$ROOT/build/kernel
work=$ROOT/build/work/kernel
stamp="$out/.recipe"
fragments=("$here/config-common" "$here/config-$arch")

recipe=$(cat "$here/build.sh" "${fragments[@]}" | sha256sum | cut -d' ' -f1)-$arch
if [ -z "${FORCE:-}" ] && [ -s "$out/vmlinuz" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$recipe" ]; then
    say "guest kernel $(cat "$out/version") is up to date"
    exit 0
fi

# The linux-source-X.Y package of the distribution's own release (Debian 12: 6.1), not a newer backport beside it.
newest_source_package() {
    apt-cache depends linux-source | sed -n 's/^ *Depends: *\(linux-source-[0-9.]*\)$/\1/p' | head -n 1
}

mkdir -p "$work/deb" "$out"
deb=${LINUX_SOURCE_DEB:-}
if [ -z "$deb" ]; then
    package=$(newest_source_package)
    if [ -z "$package" ]; then
        need_package_lists
        package=$(newest_source_package)
    fi
    [ -n "$package" ] || die "no linux-source package in apt's lists"
    deb=$(fetch_deb "$package" "$work/deb")
fi

source_tree=$work/$(basename "$deb" .deb)
if [ ! -e "$source_tree/.unpacked" ]; then
    say "unpacking $(basename "$deb")"
    rm -rf "$source_tree"
    mkdir -p "$source_tree"
    # Ubuntu ships the tree in a directory of its own, Debian directly under usr/src; the archive's name varies too.
    rm -rf "$work/unpack"
    dpkg-deb -x "$deb" "$work/unpack"
    archive=$(find "$work/unpack/usr/src" -type f -name 'linux-source-*.tar.*' | head -n 1)
    [ -n "$archive" ] || die "$(basename "$deb") holds no linux-source archive"
    tar -C "$source_tree" --strip-components=1 -xf "$archive"
    rm -rf "$work/unpack"
    touch "$source_tree/.unpacked"
fi

cd "$source_tree"
export KBUILD_BUILD_USER=vmruntime KBUILD_BUILD_HOST=vmruntime KBUILD_BUILD_TIMESTAMP="@${SOURCE_DATE_EPOCH:-0}"
make_kernel=(make -s ARCH="$KERNEL_ARCH")
if [ "$arch" != "$(uname -m)" ]; then
    make_kernel+=(CROSS_COMPILE="$arch-linux-gnu-")
fi

say "configuring"
"${make_kernel[@]}" tinyconfig >/dev/null 2>&1
ARCH=$KERNEL_ARCH scripts/kconfig/merge_config.sh -m .config "${fragments[@]}" >/dev/null 2>&1
"${make_kernel[@]}" olddefconfig

# An option whose dependencies are unmet disappears in silence; name every such one.
lost=()
while read -r line; do
    case $line in
    CONFIG_*) grep -qxF -- "$line" .config || lost+=("$line") ;;
    *)
        name=${line#\# }
        name=${name%% *}
        if grep -q "^$name=" .config; then lost+=("$line"); fi
        ;;
    esac
done < <(grep -hE '^(CONFIG_[A-Z0-9_]+=|# CONFIG_[A-Z0-9_]+ is not set$)' "${fragments[@]}")
if [ ${#lost[@]} -gt 0 ]; then
    printf '%s\n' "${lost[@]}" >&2
    die "${#lost[@]} requested kernel options did not survive; see the list above"
fi

say "compiling with $(nproc) jobs"
started=$SECONDS
nice -n 10 "${make_kernel[@]}" -j"$(nproc)" "$KERNEL_TARGET"
version=$("${make_kernel[@]}" kernelrelease)

install_file "$KERNEL_IMAGE" "$out/vmlinuz"
install_file .config "$out/config"
put_file "$out/version" "$version"
put_file "$stamp" "$recipe"
say "guest kernel $version: $(stat -c %s "$out/vmlinuz") bytes, $((SECONDS - started)) s"
