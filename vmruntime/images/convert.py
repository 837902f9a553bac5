"""Disk images of one format made into another: qemu-img, within limits, on what was checked."""

from __future__ import annotations

import os
from pathlib import Path
from secrets import token_hex

from vmruntime.aio import process
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, ResourceExhausted
from vmruntime.images.disk_check import check_disk
from vmruntime.images.disk_header import DiskFormat

_ADDRESS_SPACE = 4 * 1024**3
_TIMEOUT = 24 * 3600.0
_SUBFORMATS = {True: "streamOptimized", False: "monolithicSparse"}


async def convert(source: Path, target: Path, form: DiskFormat, *, compress: bool, max_virtual_size: int) -> None:
    """Convert a disk image; the target appears when it is whole.

    Args:
        source: Of any format that check_disk() takes.
        target: There must be nothing yet.
        form: Of the target.
        compress: Make it small; not of raw disks.
        max_virtual_size: Bytes.

    Raises:
        InvalidArgument: A raw disk is to be compressed.
        AlreadyExists: The target is there.
        BadDisk: The source is not fit.
        ResourceExhausted: It is larger than allowed, or the disk is full.
        FailedPrecondition: It cannot be read or written.
    """
    if compress and form is DiskFormat.RAW:
        raise InvalidArgument("a raw disk cannot be compressed", remedy="leave out --compress, or make a qcow2 of it")
    if await in_thread(lambda: os.path.lexists(target)):
        raise AlreadyExists(f"{target}: is there already", remedy="give another name, or remove it")
    found = await check_disk(source, max_virtual_size=max_virtual_size)
    new = target.with_name(f".{target.name}.{token_hex(4)}")
    try:
        await _run(source, found.format, new, form, compress)
        await in_thread(lambda: _publish(new, target))
    except OSError as error:
        raise FailedPrecondition(f"{target}: cannot be made: {error.strerror}") from error
    finally:
        await in_thread(lambda: new.unlink(missing_ok=True))


async def _run(source: Path, of: DiskFormat, new: Path, form: DiskFormat, compress: bool) -> None:
    opened = await in_thread(lambda: os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    try:
        argv = ["prlimit", f"--as={_ADDRESS_SPACE}", "--core=0", "--", "qemu-img", "convert", "-U"]
        argv += ["-f", of.value, "-O", form.value, *(["-c"] if compress else [])]
        if form is DiskFormat.VMDK:
            argv += ["-o", f"subformat={_SUBFORMATS[compress]}"]
        argv += ["--", f"/proc/self/fd/{opened}", str(new.absolute())]
        done = await process.run(argv, timeout=_TIMEOUT, pass_fds=(opened,), die_with_us=True)
    finally:
        os.close(opened)
    if "failed to execute qemu-img" in done.stderr:
        raise FailedPrecondition(
            "the program 'qemu-img' is not installed", remedy="vmruntime doctor says which package has it"
        )
    if "No space left" in done.stderr or "Disk quota exceeded" in done.stderr:
        raise ResourceExhausted(f"no space left in {new.parent}", remedy="free space there")
    if done.returncode != 0:
        words = process.last_lines(done.stderr).removeprefix("qemu-img: ")
        raise FailedPrecondition(f"{source}: cannot be converted: {words}")


def _publish(new: Path, target: Path) -> None:
    descriptor = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(new, target)  # unlike a rename, it replaces nothing
    except FileExistsError:
        raise AlreadyExists(f"{target}: is there already", remedy="give another name, or remove it") from None
