#!/usr/bin/env bash
# Puts the guest together: a kernel, and an initial file system of the agent (as /init) and crun.
#
# Usage: images/initramfs/build.sh     -> build/guest/{vmlinuz,initramfs.img,guest.json}
#
# KERNEL=minimal|distribution chooses; by default the minimal kernel is taken if `make kernel` has built it, else the
# distribution's own, downloaded and unpacked but not installed, with the modules named in modules.list.
# AGENT=FILE names another agent; COMPRESSION=none|lz4|zstd, OUT=DIR and ARCH are for experiments.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../lib.sh"

arch=${ARCH:-$(uname -m)}
target_kernel "$arch"
out=${OUT:-$ROOT/build/guest}
work=$ROOT/build/work/initramfs
agent=${AGENT:-$ROOT/guest-agent/target/$RUST_TARGET/release/vmruntime-agent}
compression=${COMPRESSION:-none}
kernel=${KERNEL:-}
if [ -z "$kernel" ]; then
    kernel=distribution
    if [ -s "$ROOT/build/kernel/vmlinuz" ]; then kernel=minimal; fi
fi

[ -x "$agent" ] || die "there is no agent at $agent; run: make agent"
if readelf -lW "$agent" | grep -q INTERP; then die "$agent is not static, so it cannot be /init"; fi
mkdir -p "$out" "$work/deb"
pack=(--agent "$agent")

# --- crun: ours if it was built, else the host's with the libraries it loads.
if [ -x "$ROOT/build/crun" ]; then
    crun=$ROOT/build/crun
    crun_static=true
    pack+=(--file "usr/bin/crun=$crun")
else
    crun=$(command -v crun) || die "no build/crun and no crun on this host; run: make crun, or apt-get install crun"
    crun_static=false
    say "note: no static crun; taking $crun and its libraries (each create, start and exec will be slower)"
    pack+=(--file "usr/bin/crun=$crun")
    while read -r library; do
        pack+=(--file "$library=$library")
    done < <(ldd "$crun" | grep -oE '/[^ )]+' | sort -u)
fi
crun_version=$("$crun" --version | sed -n 's/^crun version //p')

# --- the kernel
# unpack_deb PACKAGE: downloads and unpacks it into a directory named after its file, whose path it prints.
unpack_deb() {
    local file tree
    file=$(fetch_deb "$1" "$work/deb")
    tree=$work/tree-$(basename "$file" .deb)
    if [ ! -e "$tree/.unpacked" ]; then
        rm -rf "$tree"
        mkdir -p "$tree"
        dpkg-deb -x "$file" "$tree"
        touch "$tree/.unpacked"
    fi
    printf '%s\n' "$tree"
}

# real_package META: the versioned kernel package that a meta package depends on.
real_package() {
    apt-cache depends --no-recommends --no-suggests "$1" 2>/dev/null |
        sed -nE 's/^ *Depends: (linux-(image|modules)-[0-9].*)$/\1/p' | head -n 1
}

case $kernel in
minimal)
    vmlinuz=$ROOT/build/kernel/vmlinuz
    [ -s "$vmlinuz" ] || die "there is no minimal kernel; run: make kernel"
    release=$(cat "$ROOT/build/kernel/version")
    ;;
distribution)
    image=
    for meta in "linux-image-cloud-$DEB_ARCH" linux-image-virtual; do
        image=$(real_package "$meta")
        if [ -n "$image" ]; then break; fi
    done
    if [ -z "$image" ]; then
        need_package_lists
        for meta in "linux-image-cloud-$DEB_ARCH" linux-image-virtual; do
            image=$(real_package "$meta")
            if [ -n "$image" ]; then break; fi
        done
    fi
    [ -n "$image" ] || die "apt knows neither linux-image-cloud-$DEB_ARCH nor linux-image-virtual"
    tree=$(unpack_deb "$image")
    vmlinuz=$(find "$tree/boot" -name 'vmlinuz-*' | head -n 1)
    release=$(basename "$vmlinuz")
    release=${release#vmlinuz-}
    modules=$work/modules-$release
    if [ ! -e "$modules/.complete" ]; then
        # Debian has the modules beside the kernel; Ubuntu in one package, and the rarer ones in a second.
        rm -rf "$modules"
        mkdir -p "$modules"
        parts=("$image")
        for extra in "linux-modules-$release" "linux-modules-extra-$release"; do
            if apt-cache show "$extra" >/dev/null 2>&1; then parts+=("$extra"); fi
        done
        for part in "${parts[@]}"; do
            tree=$(unpack_deb "$part")
            for root in "$tree/lib/modules/$release" "$tree/usr/lib/modules/$release"; do
                if [ -d "$root" ]; then cp -al "$root/." "$modules/"; fi
            done
        done
        touch "$modules/.complete"
    fi
    pack+=(--modules "$modules" "$here/modules.list")
    ;;
*) die "KERNEL is minimal or distribution, not $kernel" ;;
esac

# --- the archive
temporary=$(mktemp -d "$out/.new.XXXXXX")
trap 'rm -rf "$temporary"' EXIT
case $compression in
none) compress=(cat) ;;
lz4) compress=(lz4 -l -9 -q -c) ;; # the kernel reads the legacy framing only
zstd) compress=(zstd -19 -T0 -q -c) ;;
*) die "COMPRESSION is none, lz4 or zstd, not $compression" ;;
esac
python=python3
if [ -x /usr/bin/python3 ]; then python=/usr/bin/python3; fi
"$python" "$here/pack.py" - "${pack[@]}" | "${compress[@]}" >"$temporary/initramfs.img"
cp "$vmlinuz" "$temporary/vmlinuz"
agent_version=$(sed -n '0,/^version *= *"\(.*\)"/s//\1/p' "$ROOT/guest-agent/Cargo.toml")
cat >"$temporary/guest.json" <<JSON
{
  "schema": 1,
  "arch": "$arch",
  "kernel": "$kernel",
  "kernel_release": "$release",
  "agent_version": "$agent_version",
  "crun_version": "$crun_version",
  "crun_static": $crun_static,
  "initramfs_sha256": "$(sha256sum <"$temporary/initramfs.img" | cut -d' ' -f1)",
  "kernel_sha256": "$(sha256sum <"$temporary/vmlinuz" | cut -d' ' -f1)"
}
JSON
chmod 0644 "$temporary"/*
# guest.json last: whoever reads it finds the files it describes.
for name in vmlinuz initramfs.img guest.json; do
    mv -f "$temporary/$name" "$out/$name"
done
say "$kernel kernel $release, initramfs $(stat -c %s "$out/initramfs.img") bytes ($compression)"
