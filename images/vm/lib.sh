# Shared by the recipes of VM images; sourced after images/lib.sh, never run.
# shellcheck shell=bash disable=SC2034,SC2154

# What a machine's firmware looks for, in one table.
# Sets EFI_NAME, EFI_STUB (systemd's, which starts a kernel with its initial file system), GRUB_EFI (GRUB's name of the
# platform) and BIOS (empty: there is none).
boot_files() {
    case $1 in
    x86_64) EFI_NAME=BOOTX64.EFI EFI_STUB=/usr/lib/systemd/boot/efi/linuxx64.efi.stub GRUB_EFI=x86_64-efi BIOS=yes ;;
    aarch64) EFI_NAME=BOOTAA64.EFI EFI_STUB=/usr/lib/systemd/boot/efi/linuxaa64.efi.stub GRUB_EFI=arm64-efi BIOS='' ;;
    *) die "no boot files for the architecture $1 (known: x86_64, aarch64)" ;;
    esac
}

# keep_modules DIRECTORY RELEASE MODULE…: removes the modules that neither are named nor needed by those, and makes the
# lists that modprobe reads. A module that the kernel has built in is passed over.
keep_modules() {
    local directory=$1 release=$2 base kept module path
    shift 2
    base=${directory%/lib/modules/*}
    depmod -b "$base" "$release"
    kept=$(mktemp)
    for module in "$@"; do
        modprobe -d "$base" -S "$release" --show-depends "$module" 2>/dev/null | sed -n 's/^insmod \([^ ]*\).*/\1/p' >>"$kept" || true
    done
    while read -r path; do
        grep -qxF "$path" "$kept" || rm -f "$path"
    done < <(find "$directory" -name '*.ko*')
    rm -f "$kept"
    find "$directory" -type d -empty -delete
    depmod -b "$base" "$release"
}

# initial_file_system WORK BUSYBOX MODULES RELEASE: writes WORK/initrd.img, which knows virtio's disks, CD-ROMs and ext4, and
# little else: an emulated processor is through it in a second. The kernel's command line names the root: root=LABEL=….
initial_file_system() {
    local work=$1 busybox=$2 modules=$3 release=$4 initial=$1/initial applet
    mkdir -p "$initial"/{bin,dev,proc,sys,root,lib/modules}
    cp "$busybox" "$initial/bin/busybox"
    for applet in sh cat mount modprobe findfs usleep switch_root; do ln -s busybox "$initial/bin/$applet"; done
    install -m 755 "$ROOT/images/vm/init" "$initial/init"
    cp -a "$modules" "$initial/lib/modules/$release"
    keep_modules "$initial/lib/modules/$release" "$release" virtio_pci virtio_scsi sr_mod sd_mod virtio_blk ext4
    (cd "$initial" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >"$work/initrd.img"
    rm -rf "$initial"
}

# unified_kernel VMLINUZ INITRD COMMAND-LINE OUT: one EFI program of all three (systemd-stub(7)).
unified_kernel() {
    local end part name size start offset arguments=()
    printf '%s' "$3" >"$4.cmdline"
    end=0
    while read -r _ name size start _; do
        case $name in .*) if ((0x$start + 0x$size > end)); then end=$((0x$start + 0x$size)); fi ;; esac
    done < <(objdump -h "$EFI_STUB" | grep -E '^ +[0-9]+ ')
    offset=$((end + 4095 & ~4095))
    for part in "cmdline=$4.cmdline" "linux=$1" "initrd=$2"; do
        name=${part%%=*}
        arguments+=(--add-section ".$name=${part#*=}" --change-section-vma ".$name=$(printf '0x%x' "$offset")")
        offset=$(((offset + $(stat -c %s "${part#*=}") + 4095) & ~4095))
    done
    objcopy "${arguments[@]}" "$EFI_STUB" "$4"
    rm -f "$4.cmdline"
}

# bootable_disk WORK ROOTFS LABEL ROOT-MIB BOOT-MIB COMMAND-LINE: writes WORK/disk.raw: GPT with a boot partition (UEFI by a
# unified kernel, BIOS by syslinux) and an ext4 root. Nothing is mounted. WORK has vmlinuz and initrd.img.
bootable_disk() {
    local work=$1 rootfs=$2 label=$3 root_mib=$4 boot_mib=$5 command_line=$6 sector=2048
    local boot=$work/boot.img files=$work/disk.raw
    truncate -s "${boot_mib}M" "$boot"
    mkfs.fat -n BOOT "$boot" >/dev/null
    mmd -i "$boot" ::/EFI ::/EFI/BOOT
    unified_kernel "$work/vmlinuz" "$work/initrd.img" "$command_line" "$work/$EFI_NAME"
    mcopy -i "$boot" "$work/$EFI_NAME" "::/EFI/BOOT/$EFI_NAME"
    if [ -n "$BIOS" ]; then
        mcopy -i "$boot" "$work/vmlinuz" ::/vmlinuz
        mcopy -i "$boot" "$work/initrd.img" ::/initrd.img
        printf 'DEFAULT linux\nPROMPT 0\nTIMEOUT 0\nLABEL linux\n  LINUX /vmlinuz\n  INITRD /initrd.img\n  APPEND %s\n' "$command_line" >"$work/syslinux.cfg"
        mcopy -i "$boot" "$work/syslinux.cfg" ::/syslinux.cfg
        syslinux --install "$boot"
    fi
    truncate -s "${root_mib}M" "$work/root.img"
    mkfs.ext4 -q -F -L "$label" -d "$rootfs" "$work/root.img"
    truncate -s "$((boot_mib + root_mib + 2))M" "$files"
    sfdisk --quiet "$files" <<TABLE
label: gpt
start=$sector, size=${boot_mib}MiB, type=uefi, name=boot, attrs=LegacyBIOSBootable
start=$((sector + boot_mib * 2048)), type=linux, name=root
TABLE
    dd if="$boot" of="$files" bs=1M seek=1 conv=notrunc,sparse status=none
    dd if="$work/root.img" of="$files" bs=1M seek=$((1 + boot_mib)) conv=notrunc,sparse status=none
    if [ -n "$BIOS" ]; then
        dd if=/usr/lib/syslinux/mbr/gptmbr.bin of="$files" bs=440 count=1 conv=notrunc status=none
    fi
    rm -f "$boot" "$work/root.img"
}

# compressed_image RAW OUT: moves the disk into a compressed qcow2, which is put in its place when it is whole.
compressed_image() {
    qemu-img convert -q -c -W -m 8 -O qcow2 "$1" "$2.tmp"
    mv "$2.tmp" "$2"
    rm -f "$1"
}

# grub_disk WORK ROOTFS LABEL ROOT-MIB: writes WORK/disk.raw, laid out as Debian's cloud images are: GPT with the root (ext4)
# as the first partition and last on the disk, where it can grow, before it GRUB for BIOS and for UEFI. Nothing is mounted.
# Both read /boot/grub/grub.cfg of the root.
grub_disk() {
    local work=$1 rootfs=$2 label=$3 root_mib=$4 esp_mib=16 disk=$1/disk.raw esp=$1/esp.img
    local modules=(part_gpt ext2 search search_label linux configfile normal echo test)
    # shellcheck disable=SC2016 # the variables are those of GRUB
    printf 'search --no-floppy --label %s --set=root\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n' "$label" >"$work/grub-early.cfg"
    grub-mkimage -O "$GRUB_EFI" -p /boot/grub -c "$work/grub-early.cfg" -o "$work/$EFI_NAME" "${modules[@]}" fat
    truncate -s "${esp_mib}M" "$esp"
    mkfs.fat -n ESP "$esp" >/dev/null
    mmd -i "$esp" ::/EFI ::/EFI/BOOT
    mcopy -i "$esp" "$work/$EFI_NAME" "::/EFI/BOOT/$EFI_NAME"
    truncate -s "${root_mib}M" "$work/root.img"
    mkfs.ext4 -q -F -L "$label" -d "$rootfs" "$work/root.img"
    truncate -s "$((esp_mib + root_mib + 2))M" "$disk"
    sfdisk --quiet "$disk" <<TABLE
label: gpt
first-lba: 34
${disk}15: start=2048, size=${esp_mib}MiB, type=uefi, name=esp
${disk}1: start=$(((1 + esp_mib) * 2048)), type=linux, name=root
$([ -z "$BIOS" ] || echo "${disk}14: start=34, size=2014, type=21686148-6449-6E6F-744E-656564454649, name=bios")
TABLE
    dd if="$esp" of="$disk" bs=1M seek=1 conv=notrunc,sparse status=none
    dd if="$work/root.img" of="$disk" bs=1M seek=$((1 + esp_mib)) conv=notrunc,sparse status=none
    if [ -n "$BIOS" ]; then
        grub-mkimage -O i386-pc -p /boot/grub -c "$work/grub-early.cfg" -o "$work/core.img" "${modules[@]}" biosdisk linux16
        grub_bios "$disk" "$work/core.img" 34
    fi
    rm -f "$esp" "$work/root.img"
}

# grub_bios DISK CORE SECTOR: puts GRUB's boot record and core image on a disk, as grub-bios-setup does on one that it can
# find mounted: the record has the core's first sector at 0x5c, and that sector has at 0x1f4 where the others begin
# (GRUB's boot.h, diskboot.S).
grub_bios() {
    local disk=$1 core=$2 sector=$3
    [ "$(stat -c %s "$core")" -le $((2014 * 512)) ] || die "GRUB is larger than its partition"
    dd if=/usr/lib/grub/i386-pc/boot.img of="$disk" bs=440 count=1 conv=notrunc status=none
    dd if="$core" of="$disk" bs=512 seek="$sector" conv=notrunc status=none
    little_endian "$sector" | dd of="$disk" bs=1 seek=$((0x5c)) conv=notrunc status=none
    little_endian $((sector + 1)) | dd of="$disk" bs=1 seek=$((sector * 512 + 0x1f4)) conv=notrunc status=none
}

# little_endian NUMBER: its eight bytes.
little_endian() {
    local number=$1 byte
    for byte in 0 1 2 3 4 5 6 7; do
        # shellcheck disable=SC2059
        printf "\\x$(printf %02x $((number >> (8 * byte) & 255)))"
    done
}
