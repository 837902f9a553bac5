#!/usr/bin/env bash
# Makes a containerDisk of a VM image that was built before: an OCI image whose one layer has it in /disk, as KubeVirt wants it.
#
# Usage: images/vm/containerdisk.sh NAME     -> build/vm-images/NAME.containerdisk.tar, tagged demo.local/NAME-disk:1
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../lib.sh"

name=${1:?usage: images/vm/containerdisk.sh NAME}
disk=$ROOT/build/vm-images/$name.qcow2
out=$ROOT/build/vm-images/$name.containerdisk.tar
[ -s "$disk" ] || die "there is no $disk; run: images/vm/$name/build.sh"
if [ "$out" -nt "$disk" ]; then exit 0; fi
work=$(mktemp -d "$ROOT/build/vm-images/.$name.XXXXXX")
trap 'rm -rf "$work"' EXIT
umoci init --layout "$work/oci"
umoci new --image "$work/oci:$name"
umoci unpack --image "$work/oci:$name" "$work/bundle"
mkdir "$work/bundle/rootfs/disk"
cp "$disk" "$work/bundle/rootfs/disk/"
chown -R 107:107 "$work/bundle/rootfs/disk" # the account of QEMU in KubeVirt's images
chmod 0440 "$work/bundle/rootfs/disk/$name.qcow2"
umoci repack --image "$work/oci:$name" "$work/bundle"
skopeo copy --quiet --insecure-policy "oci:$work/oci:$name" "oci-archive:$work/disk.tar:demo.local/$name-disk:1"
mv "$work/disk.tar" "$out"
