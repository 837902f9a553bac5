#!/usr/bin/env bash
# Makes a Debian cloud image from Debian's packages: systemd, cloud-init with netplan, OpenSSH, QEMU's guest agent; it is
# started by GRUB, by BIOS and by UEFI (without Secure Boot), and its root file system grows with the disk.
#
# Usage: images/vm/debian/build.sh     -> build/vm-images/debian.qcow2; what is there already is kept
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../../lib.sh"
# shellcheck source=images/vm/lib.sh
. "$here/../lib.sh"

out=$ROOT/build/vm-images/debian.qcow2
recipe=$(cat "$here"/../{lib.sh,init} "$here"/build.sh | sha256sum | cut -d' ' -f1)
if [ -s "$out" ] && [ "$(cat "$out.recipe" 2>/dev/null)" = "$recipe" ]; then exit 0; fi
target_kernel "$(uname -m)"
boot_files "$(uname -m)"
mkdir -p "$ROOT/build/vm-images"
work=$(mktemp -d "$ROOT/build/vm-images/.debian.XXXXXX")
trap 'rm -rf "$work"' EXIT
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
root=$work/root
packages=("linux-image-cloud-$DEB_ARCH" initramfs-tools zstd systemd-sysv systemd-resolved systemd-timesyncd dbus libpam-systemd
    libnss-resolve udev cloud-init netplan.io cloud-guest-utils fdisk e2fsprogs openssh-server qemu-guest-agent sudo
    iproute2 iputils-ping curl ca-certificates procps kmod less)

# What packages read while they are installed: what initial file systems have, and where kernels are linked. Drives are
# there from the start: cloud-init looks for a seed before systemd has started udev, and is not run where there is none.
mkdir -p "$work/early/etc/initramfs-tools/conf.d" "$work/early/usr/share/initramfs-tools/modules.d"
printf 'MODULES=list\nCOMPRESS=zstd\n' >"$work/early/etc/initramfs-tools/conf.d/vm"
printf '%s\n' virtio_pci virtio_blk virtio_scsi sd_mod sr_mod nvme >"$work/early/usr/share/initramfs-tools/modules.d/vm"
printf 'do_symlinks=yes\nlink_in_boot=no\n' >"$work/early/etc/kernel-img.conf"

say "installing Debian $suite packages"
mmdebstrap --quiet --variant=minbase --include="$(printf '%s,' "${packages[@]}")" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --essential-hook="copy-in $work/early/etc $work/early/usr /" "$suite" "$root" </dev/null

say "configuring"
printf 'LABEL=debian-root / ext4 rw,discard,errors=remount-ro 0 1\n' >"$root/etc/fstab"
printf 'debian\n' >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"
printf 'LANG=C.UTF-8\n' >"$root/etc/default/locale"
ln -sf /run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
# Each machine makes its own; an empty machine-id is filled in at the first boot and kept.
rm -f "$root"/etc/ssh/ssh_host_*_key* "$root/var/lib/dbus/machine-id" "$root"/var/lib/systemd/{random-seed,credential.secret}
: >"$root/etc/machine-id"
ln -s /etc/machine-id "$root/var/lib/dbus/machine-id"
mkdir -p "$root/var/log/journal" # journald keeps its journal where this is
cat >"$root/etc/cloud/cloud.cfg.d/01_image.cfg" <<'YAML'
datasource_list: [NoCloud, ConfigDrive, None]
# Keys of the other kinds take many seconds to make on an emulated processor.
ssh_genkeytypes: [ed25519, ecdsa]
YAML
chroot "$root" systemctl --quiet enable systemd-networkd systemd-resolved qemu-guest-agent ssh
chroot "$root" systemctl --quiet disable apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer e2scrub_reap.service
# netplan starts it again where it is only disabled, and it waits 12 seconds for an IPv6 router that pods do not have.
chroot "$root" systemctl --quiet mask systemd-networkd-wait-online.service
# What a processor offers and a first boot has no use for; each costs an emulated one a second. By hand they load still.
chroot "$root" systemctl --quiet mask modprobe@{dm_mod,drm,efi_pstore,loop}.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount
printf 'blacklist %s\n' kvm_amd kvm_intel aesni_intel ghash_clmulni_intel powernow_k8 sg >"$root/etc/modprobe.d/first-boot.conf"
rm -rf "$root"/var/{cache/apt,lib/apt/lists,cache/debconf}/* "$root"/var/log/{apt,dpkg.log,alternatives.log,bootstrap.log} \
    "$root/var/cache/ldconfig/aux-cache"
find "$root/dev" "$root/tmp" "$root/run" -mindepth 1 -delete

say "packing the initial file system"
# In the place of Debian's, which takes an emulated processor ten seconds; kernels that the guest installs get that one.
kernel=$(find "$root/boot" -name 'vmlinuz-*' | head -n 1)
release=${kernel##*/vmlinuz-}
busybox=$(fetch_deb busybox-static "$work")
dpkg-deb -x "$busybox" "$work/busybox"
initial_file_system "$work" "$work/busybox/bin/busybox" "$root/lib/modules/$release" "$release"
mv "$work/initrd.img" "$root/boot/initrd.img-$release"

# The kernel's package keeps /vmlinuz and /initrd.img pointing at the newest, so a new kernel needs no new menu.
command_line="root=LABEL=debian-root ro console=tty0 console=$CONSOLE,115200 panic=0 mitigations=off no_timer_check edd=off"
mkdir -p "$root/boot/grub"
cat >"$root/boot/grub/grub.cfg" <<GRUB
set timeout=0
menuentry 'Debian' {
    # By the kernel's 16-bit entry: from the 32-bit one it takes three seconds more on an emulated processor.
    if [ "\$grub_platform" = pc ]; then
        linux16 /vmlinuz $command_line
        initrd16 /initrd.img
    else
        linux /vmlinuz $command_line
        initrd /initrd.img
    fi
}
GRUB

say "putting the disk together"
grub_disk "$work" "$root" debian-root 2048
compressed_image "$work/disk.raw" "$out"
put_file "$out.recipe" "$recipe"
say "$out: $(($(stat -c %s "$out") / 1048576)) MiB"
