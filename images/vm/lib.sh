# Shared by the recipes of VM images; sourced after images/lib.sh, never run.
# shellcheck shell=bash disable=SC2034,SC2154

# What a machine's firmware looks for, in one table.
# Sets EFI_NAME, EFI_STUB (systemd's, which starts a kernel with its initial file system) and BIOS (empty: there is none).
boot_files() {
    case $1 in
    x86_64) EFI_NAME=BOOTX64.EFI EFI_STUB=/usr/lib/systemd/boot/efi/linuxx64.efi.stub BIOS=yes ;;
    aarch64) EFI_NAME=BOOTAA64.EFI EFI_STUB=/usr/lib/systemd/boot/efi/linuxaa64.efi.stub BIOS='' ;;
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
