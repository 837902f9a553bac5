r"""A root disk on a block volume: an image written onto it once, and never again.

The guest has the volume but for its last MiB, which says what was written:

    "vmruntime root\n\0"   16 bytes
    length, CRC-32           of the JSON, 4 bytes each, little endian
    JSON                     {"version": 1, "image": "sha256:…", "state": "writing" | "done"}

A volume that has neither this nor nothing at all on it is somebody's data and is left alone; so is one of another image.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Literal

import msgspec

from vmruntime.aio import process
from vmruntime.aio.detached import drop_privileges
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, ResourceExhausted, VmruntimeError
from vmruntime.images.reference import is_digest
from vmruntime.model.image import DiskImage

OURS = 1024 * 1024
"""Bytes at the volume's end that the guest does not see."""

VERSION = 1
_MAGIC = b"vmruntime root\n\0"
_HEAD = struct.Struct("<II")
_BLOCK = 4096
_WRITE_TIMEOUT = 24 * 3600.0
_BLKID_NOTHING = 2  # blkid(8), EXIT STATUS
_ADDRESS_SPACE = 4 * 1024**3


class _Trailer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    image: str
    state: Literal["writing", "done"]


async def prepare(
    device: Path,
    disk_path: Path,
    disk: DiskImage,
    image_digest: str,
    *,
    account: str = "",
    node: Path | None = None,
) -> int:
    """Write an image onto a blank volume, or find that this was done.

    The volume is claimed meanwhile: what is mounted, or part of a RAID or volume group, is refused.

    Args:
        device: A block device, or a file.
        disk_path: The image's disk.
        disk: What is known of it.
        image_digest: "sha256:…" by which the image is known again.
        account: Who qemu-img runs as, when we are root; the device has to be writable by it and the disk readable. Empty: as
            we are.

        node: Another node of the device, which the account may open; None: `device` itself.

    Returns:
        The bytes that the guest is to see, from the volume's beginning.

    Raises:
        InvalidArgument: The volume is too small.
        FailedPrecondition: It holds another image, or something else; it is not touched.
        ResourceExhausted: A file's file system is full.
    """
    descriptor = await in_thread(lambda: _open(device, node or device))
    try:
        size, trailer = await in_thread(lambda: _inspect(descriptor, device))
        if trailer is not None and trailer.image != image_digest:
            raise FailedPrecondition(
                f"{device}: holds a root disk made from the image {trailer.image}, not from {image_digest}, and is not"
                " written over",
                remedy="go back to that image, use another volume, or empty this one: blkdiscard --zeroout, then start again",
            )
        if trailer is not None and trailer.state == "done":
            return size
        if size < disk.virtual_size:
            raise InvalidArgument.field(
                "the volume",
                str(device),
                f"has {size + OURS} bytes; the image needs {disk.virtual_size + OURS}",
                remedy="use a larger volume",
            )
        if trailer is None:
            await _check_blank(descriptor, device)
        await in_thread(lambda: _write(descriptor, size, _Trailer(VERSION, image_digest, "writing")))
        await _convert(descriptor, device, disk_path, disk, account)
        await in_thread(lambda: os.fsync(descriptor))
        await in_thread(lambda: _write(descriptor, size, _Trailer(VERSION, image_digest, "done")))
    except OSError as error:
        raise _error(device, error) from error
    finally:
        os.close(descriptor)
    return size


def _open(device: Path, node: Path) -> int:
    try:
        kind = stat.S_IFMT(node.stat().st_mode)
        if kind not in (stat.S_IFBLK, stat.S_IFREG):
            raise InvalidArgument.field("the volume", str(device), "is neither a block device nor a file")
        # Of a block device O_EXCL is the kernel's claim, which mounts have as well (open(2)). qemu-img inherits it, so
        # that even one that was left behind keeps others away.
        exclusive = os.O_EXCL if kind == stat.S_IFBLK else 0
        return os.open(node, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except OSError as error:
        raise _error(device, error) from error


def _inspect(descriptor: int, device: Path) -> tuple[int, _Trailer | None]:
    """Return the guest's part in bytes and what is known of it."""
    whole = os.lseek(descriptor, 0, os.SEEK_END)
    size = (whole - OURS) // _BLOCK * _BLOCK
    if size <= 0:
        raise InvalidArgument.field("the volume", str(device), f"has {whole} bytes", remedy="use a larger volume")
    block = os.pread(descriptor, _BLOCK, size)
    if not block.startswith(_MAGIC):
        return size, None
    try:
        length, crc = _HEAD.unpack_from(block, len(_MAGIC))
        start = len(_MAGIC) + _HEAD.size
        text = block[start : start + length]
        trailer = msgspec.json.decode(text, type=_Trailer) if zlib.crc32(text) == crc else None
    except msgspec.DecodeError:
        trailer = None
    if trailer is None or trailer.version != VERSION or not is_digest(trailer.image):
        raise FailedPrecondition(
            f"{device}: what its last MiB says of its root disk is damaged, or of a newer vmruntime",
            remedy="use another volume, or save what is on it and empty it: blkdiscard --zeroout",
        )
    return size, trailer


async def _check_blank(descriptor: int, device: Path) -> None:
    opened = f"/proc/self/fd/{descriptor}"
    blank = await in_thread(lambda: _ends_are_zero(descriptor))
    if blank:
        done = await process.run(["blkid", "-p", "--", opened], pass_fds=(descriptor,), die_with_us=True)
        blank = done.returncode == _BLKID_NOTHING
    if not blank:
        raise FailedPrecondition(
            f"{device}: is not blank, and nothing says that it is a root disk of an image pod (a volume that was resized has"
            " lost that)",
            remedy="use another volume, or save what is on it and empty it: blkdiscard --zeroout",
        )


def _ends_are_zero(descriptor: int) -> bool:
    whole = os.lseek(descriptor, 0, os.SEEK_END)
    zero = bytes(OURS)
    return all(os.pread(descriptor, OURS, place) == zero for place in (0, whole - OURS))


def _write(descriptor: int, place: int, trailer: _Trailer) -> None:
    text = msgspec.json.encode(trailer)
    block = (_MAGIC + _HEAD.pack(len(text), zlib.crc32(text)) + text).ljust(_BLOCK, b"\0")
    if os.pwrite(descriptor, block, place) != len(block):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    os.fsync(descriptor)


async def _convert(descriptor: int, device: Path, disk_path: Path, disk: DiskImage, account: str) -> None:
    source = await in_thread(lambda: os.open(disk_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    try:
        argv = ["prlimit", f"--as={_ADDRESS_SPACE}", "--core=0", "--"]
        if account and os.geteuid() == 0:
            # Becoming somebody else clears the signal that die_with_us asked for (prctl(2)).
            argv += [*drop_privileges(account)[:-1], "--pdeathsig", "KILL", "--"]
        argv += ["qemu-img", "convert", "-n", "-U", "-f", disk.format, "-O", "raw", "--"]
        argv += [f"/proc/self/fd/{source}", f"/proc/self/fd/{descriptor}"]
        done = await process.run(
            argv, timeout=_WRITE_TIMEOUT, cwd=Path("/"), pass_fds=(source, descriptor), die_with_us=True
        )
    except DeadlineExceeded:
        raise FailedPrecondition(f"{device}: the image was not written within {_WRITE_TIMEOUT:g} s") from None
    finally:
        os.close(source)
    if done.returncode != 0:
        words = process.last_lines(done.stderr).removeprefix("qemu-img: ")
        if "No space left" in done.stderr:
            raise ResourceExhausted(f"{device}: no space left: {words}", remedy="free space there")
        raise FailedPrecondition(f"{device}: the image cannot be written to it: {words}")


def _error(device: Path, error: OSError) -> VmruntimeError:
    if error.errno == errno.EBUSY:
        return FailedPrecondition(
            f"{device}: is in use on the host: mounted, or part of a RAID or volume group", remedy="use another volume"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"{device}: no space left", remedy="free space there")
    return FailedPrecondition(f"{device}: cannot be used: {error.strerror}")
