"""What the first bytes of a disk image say, before a program is let near it.

qemu-img opens what some images refer to (extents of VMDK, external data files of QCOW2), and so would read files of
the host for whoever made the image. Formats: docs/interop/qcow2.txt of QEMU; "Virtual Disk Format 5.0" of VMware.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

from vmruntime.images.manifest import BadImage

HEAD = 64 * 1024
"""Bytes that inspect() wants to see."""

SNAPSHOT_LIMIT = 64

_QCOW2 = b"QFI\xfb"
_BOOT_SIGNATURE = b"\x55\xaa"
_CONVERT = "convert it: qemu-img convert -O qcow2 IMAGE disk.qcow2"
_UNPACK = "unpack it first"

_CORRUPT, _DATA_FILE = 1 << 1, 1 << 2
_KNOWN_FEATURES = 0b11111  # dirty, corrupt, external data file, compression type, extended L2
_DATA_FILE_EXTENSION = 0x44415441
_VMDK_TYPES = ("monolithicSparse", "streamOptimized")

# (offset, bytes, what it is, what to do)
_OTHERS = (
    (0, b"KD", "a VMDK of several files", _CONVERT),
    (0, b"# Disk DescriptorFile", "a VMDK whose data are in other files", _CONVERT),
    (0, b"COWD", "a VMDK of an old version", _CONVERT),
    (0, b"vhdxfile", "a VHDX image", _CONVERT),
    (0, b"conectix", "a VHD image", _CONVERT),
    (0, b"QED\0", "a QED image", _CONVERT),
    (64, b"\x7f\x10\xda\xbe", "a VDI image", _CONVERT),
    (0, b"LUKS\xba\xbe", "encrypted by LUKS", "decrypt it"),
    (0, b"\x1f\x8b", "packed by gzip", _UNPACK),
    (0, b"\xfd7zXZ\0", "packed by xz", _UNPACK),
    (0, b"BZh", "packed by bzip2", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "packed by zstd", _UNPACK),
    (0, b"PK\x03\x04", "a ZIP archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
)


class DiskFormat(enum.Enum):
    """Formats of disks, by QEMU's names."""

    QCOW2 = "qcow2"
    RAW = "raw"
    VMDK = "vmdk"


class BadDisk(BadImage):
    """Raised when a file is not a disk image that a VM may be given."""


def inspect(name: str, head: bytes, size: int, declared: DiskFormat | None = None) -> DiskFormat:
    """Return an image's format, and refuse it if its header refers to other files, or is none we take.

    Args:
        name: Of the image, for messages.
        head: Its first HEAD bytes.
        size: Bytes of the whole file.
        declared: The format somebody said it has. Without it only what a BIOS would boot counts as raw: anything at
            all is a raw image.

    Raises:
        BadDisk: It cannot be used; the message says what it is and what to do.
    """
    found = _format(name, head, declared)
    if declared is not None and found is not declared:
        # A guest that owns a raw disk can write the header of another format into it.
        raise BadDisk(f"{name}: is said to be {declared.value}, but is {found.value}", remedy="correct the format")
    match found:
        case DiskFormat.QCOW2:
            _check_qcow2(name, head)
        case DiskFormat.VMDK:
            _check_vmdk(name, head)
        case DiskFormat.RAW if size % 512 != 0:
            raise BadDisk(f"{name}: has {size} bytes, which is no number of sectors", remedy="download it again")
    return found


def _format(name: str, head: bytes, declared: DiskFormat | None) -> DiskFormat:
    if head.startswith(_QCOW2):
        return DiskFormat.QCOW2
    if head.startswith(b"KDMV"):
        return DiskFormat.VMDK
    for offset, magic, what, remedy in _OTHERS:
        if head[offset : offset + len(magic)] == magic:
            raise BadDisk(f"{name}: is {what}", remedy=remedy)
    if declared is DiskFormat.RAW or head[510:512] == _BOOT_SIGNATURE:
        return DiskFormat.RAW
    if head.lstrip().startswith((b"<", b"{")):
        raise BadDisk(f"{name}: is a web page or another text, not a disk image", remedy="check the URL")
    raise BadDisk(
        f"{name}: is no QCOW2 or VMDK image, and no raw one that could be booted (bytes 510 and 511 are not 55 AA)",
        remedy="check where it comes from",
    )


def _check_qcow2(name: str, head: bytes) -> None:
    if len(head) < 72:
        raise BadDisk(f"{name}: ends within its header", remedy="download it again")
    version, backing_offset = struct.unpack_from(">IQ", head, 4)
    (encryption,) = struct.unpack_from(">I", head, 32)
    (snapshots,) = struct.unpack_from(">I", head, 60)
    if version not in (2, 3):
        raise BadDisk(f"{name}: is QCOW of version {version}; 2 and 3 are known", remedy=_CONVERT)
    if backing_offset:
        raise BadDisk(f"{name}: has a backing file: it is only a part of an image", remedy=_CONVERT)
    if encryption:
        raise BadDisk(f"{name}: is encrypted", remedy="decrypt it by qemu-img convert")
    if snapshots > SNAPSHOT_LIMIT:
        raise BadDisk(f"{name}: has {snapshots} internal snapshots", remedy=_CONVERT)
    if version == 3:
        _check_qcow2_features(name, head)


def _check_qcow2_features(name: str, head: bytes) -> None:
    if len(head) < 104:
        raise BadDisk(f"{name}: ends within its header", remedy="download it again")
    (incompatible,) = struct.unpack_from(">Q", head, 72)
    if incompatible & _DATA_FILE or _DATA_FILE_EXTENSION in _extensions(head):
        raise BadDisk(f"{name}: keeps its data in another file", remedy=_CONVERT)
    if incompatible & _CORRUPT:
        raise BadDisk(
            f"{name}: says of itself that it is corrupt", remedy="qemu-img check -r all IMAGE, or another copy"
        )
    if incompatible & ~_KNOWN_FEATURES:
        raise BadDisk(f"{name}: has features of a newer QCOW2 ({incompatible:#x})", remedy=_CONVERT)


def _extensions(head: bytes) -> Iterator[int]:
    """Iterate over the types of the header's extensions."""
    (place,) = struct.unpack_from(">I", head, 100)
    while 104 <= place <= len(head) - 8:
        kind, length = struct.unpack_from(">II", head, place)
        if kind == 0:
            return
        yield kind
        place += 8 + (length + 7) // 8 * 8


def _check_vmdk(name: str, head: bytes) -> None:
    if len(head) < 512:
        raise BadDisk(f"{name}: ends within its header", remedy="download it again")
    capacity, _, place, sectors = struct.unpack_from("<QQQQ", head, 12)
    # Without a capacity the file is only a container for a descriptor, which names other files.
    if capacity == 0 or place == 0:
        raise BadDisk(f"{name}: is a VMDK whose data are in other files", remedy=_CONVERT)
    descriptor = head[place * 512 : (place + sectors) * 512].split(b"\0", 1)[0].decode(errors="replace")
    if not descriptor:
        raise BadDisk(f"{name}: is a VMDK without a descriptor at its beginning", remedy=_CONVERT)
    members = dict(_members(descriptor))
    if members.get("createtype") not in _VMDK_TYPES:
        kind = members.get("createtype", "unknown")[:40]
        raise BadDisk(f"{name}: is a VMDK of type {kind!r}; {' and '.join(_VMDK_TYPES)} are taken", remedy=_CONVERT)
    if "parentfilenamehint" in members or members.get("parentcid", "ffffffff").lower() != "ffffffff":
        raise BadDisk(f"{name}: has a parent: it is only a part of an image", remedy=_CONVERT)


def _members(descriptor: str) -> Iterator[tuple[str, str]]:
    for line in descriptor.splitlines():
        key, equals, value = line.partition("=")
        if equals:
            yield key.strip().lower(), value.strip().strip('"')
