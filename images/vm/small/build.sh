#!/usr/bin/env bash
# Makes a small VM image that boots in seconds, by BIOS and by UEFI: Debian's cloud kernel and BusyBox, with QEMU's guest
# agent, dropbear, a web server, and a reader of cloud-init seeds (files/seed).
#
# Usage: images/vm/small/build.sh     -> build/vm-images/small.qcow2; what is there already is kept
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../../lib.sh"
# shellcheck source=images/vm/lib.sh
. "$here/../lib.sh"

out=$ROOT/build/vm-images/small.qcow2
recipe=$(cat "$here"/../{lib.sh,init} "$here"/build.sh "$here"/files/* | sha256sum | cut -d' ' -f1)
if [ -s "$out" ] && [ "$(cat "$out.recipe" 2>/dev/null)" = "$recipe" ]; then exit 0; fi
target_kernel "$(uname -m)"
boot_files "$(uname -m)"
mkdir -p "$ROOT/build/vm-images"
work=$(mktemp -d "$ROOT/build/vm-images/.small.XXXXXX")
trap 'rm -rf "$work"' EXIT
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
root=$work/root
command_line="root=LABEL=small-root console=$CONSOLE,115200 loglevel=6 panic=0 net.ifnames=0 mitigations=off no_timer_check edd=off"

say "unpacking Debian $suite packages"
mmdebstrap --quiet --variant=extract --include="$(printf '%s,' \
    "linux-image-cloud-$DEB_ARCH" busybox-static qemu-guest-agent dropbear-bin python3-minimal python3-yaml)" \
    "$suite" "$root" </dev/null
kernel=$(find "$root/boot" -name 'vmlinuz-*' | head -n 1)
release=$(basename "$kernel")
release=${release#vmlinuz-}

say "trimming"
modules=(virtio_pci virtio_scsi sd_mod virtio_blk ext4 pvpanic-pci button evdev virtio_console sr_mod isofs virtio_net
    virtio_balloon virtio-rng vmw_vsock_virtio_transport fuse virtiofs virtio_mem)
keep_modules "$root/lib/modules/$release" "$release" "${modules[@]}"
cp "$kernel" "$work/vmlinuz"
rm -rf "${root:?}"/boot/* "$root"/usr/share/{doc,man,locale,info,lintian,bug,zoneinfo,perl,i18n,common-licenses,bash-completion} \
    "$root"/var/{cache,lib/apt,lib/dpkg} "$root"/usr/lib/*-linux-gnu/{perl,perl-base,gconv} "$root"/usr/lib/systemd \
    "$root"/usr/share/perl* "$root"/usr/bin/{perl*,apt*,dpkg*} "$root"/usr/lib/{apt,udev}
find "$root/usr/lib/python3"* -name '__pycache__' -prune -exec rm -rf {} +

say "putting the root file system together"
# A merged /usr, as Debian has it; packages that were only unpacked have files in both.
for name in bin sbin lib lib64; do
    if [ -d "$root/$name" ] && [ ! -L "$root/$name" ]; then
        mkdir -p "$root/usr/$name"
        cp -a "$root/$name/." "$root/usr/$name/"
        rm -rf "${root:?}/$name"
        ln -s "usr/$name" "$root/$name"
    fi
done
mkdir -p "$root"/{dev,proc,sys,run,tmp,srv,root,mnt,var/log,var/lib,etc/dropbear,etc/acpi/PWRF,usr/local/sbin,usr/sbin}
ln -sfn /run "$root/var/run" # where the guest agent keeps its state
chmod 1777 "$root/tmp"
for applet in $("$root/usr/bin/busybox" --list); do
    for at in usr/bin usr/sbin; do [ ! -e "$root/$at/$applet" ] || continue 2; done
    [ "$applet" = busybox ] || ln -s ../bin/busybox "$root/usr/sbin/$applet"
done
ln -sf ../bin/busybox "$root/usr/sbin/init"
ln -sf busybox "$root/usr/bin/sh"
# Compiled here once rather than by an emulated processor at every boot; the guest's Python is the host's (one suite).
/usr/bin/python3 -m compileall -q -o 0 --invalidation-mode unchecked-hash -s "$root" "$root"/usr/lib/python3*
[ -e "$root/usr/bin/python3" ] || ln -s "$(cd "$root/usr/bin" && echo python3.*[0-9])" "$root/usr/bin/python3"
install -m 755 "$here/files/rc" "$here/files/rc.shutdown" "$here/files/seed" "$here/files/udhcpc.script" "$root/usr/local/sbin/"
install -m 755 "$here/files/power-button" "$root/etc/acpi/PWRF/00000080"
printf '#!/bin/sh\n# What the guest agent calls.\ncase " $* " in *" -r "*) exec reboot ;; *) exec poweroff ;; esac\n' >"$root/usr/sbin/shutdown"
chmod 755 "$root/usr/sbin/shutdown"
install -m 644 "$here/files/inittab" "$root/etc/inittab"
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n' >"$root/etc/passwd"
printf 'root:*:19000:0:99999:7:::\n' >"$root/etc/shadow"
printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
printf '/bin/sh\n' >"$root/etc/shells"
printf 'small\n' >"$root/etc/hostname"
printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
printf 'export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nPS1="vm# "\n' >"$root/etc/profile"
printf '<html><body>the small VM image</body></html>\n' >"$root/srv/index.html"
"$root/usr/bin/busybox" --list | grep -qx httpd || die "Debian's BusyBox has no httpd any more"

say "packing the initial file system"
initial_file_system "$work" "$root/usr/bin/busybox" "$root/usr/lib/modules/$release" "$release"

say "putting the disk together"
bootable_disk "$work" "$root" small-root 384 64 "$command_line"
compressed_image "$work/disk.raw" "$out"
put_file "$out.recipe" "$recipe"
say "$out: $(($(stat -c %s "$out") / 1048576)) MiB"
