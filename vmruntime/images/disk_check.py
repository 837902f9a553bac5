"""Whether a disk image from somewhere may be given to a VM: its header first, then qemu-img within tight limits."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec

from vmruntime.aio import process
from vmruntime.aio.detached import drop_privileges
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted
from vmruntime.images.disk_header import HEAD, BadDisk, DiskFormat, inspect

TIMEOUT = 60.0
CPU_SECONDS = 20
ADDRESS_SPACE = 1024 * 1024 * 1024
"""Bytes; qemu-img needs a tenth of it for an honest image."""

OUTPUT_LIMIT = 1024 * 1024
_REMEDY = "get the image from somewhere else, or convert it: qemu-img convert -O qcow2 IMAGE disk.qcow2"


class DiskInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A disk image that was found to be fit.

    Attributes:
        virtual_size: Bytes that the guest sees.
        file_size: Bytes of the file.
    """

    format: DiskFormat
    virtual_size: int
    file_size: int


class _Details(msgspec.Struct, rename="kebab"):
    """format-specific.data; unknown members are of no interest."""

    data_file: str | None = None
    corrupt: bool = False
    create_type: str = ""
    parent_cid: int = 0xFFFFFFFF
    extents: list[dict[str, Any]] | None = None


class _Specific(msgspec.Struct):
    data: _Details | None = None


class _Info(msgspec.Struct, rename="kebab"):
    """What qemu-img info --output=json answers (ImageInfo of QEMU's QAPI)."""

    format: str
    virtual_size: int
    encrypted: bool = False
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    format_specific: _Specific | None = None


async def check_disk(
    path: Path, *, max_virtual_size: int, declared: DiskFormat | None = None, account: str = "", name: str = ""
) -> DiskInfo:
    """Check a disk image.

    qemu-img gets the open file, never its path: it needs no way to it.

    Args:
        path: The file, not a link.
        max_virtual_size: Bytes.
        declared: The format that it has to have; None: any that is safe to tell by its header.
        account: Who qemu-img is run as, when we are root; the file has to be readable by it. Empty: as we are.
        name: What messages call the image; empty: its path.

    Raises:
        BadDisk: It is none, damaged, encrypted, refers to other files, or is not of the declared format.
        ResourceExhausted: It is larger than `max_virtual_size`.
        FailedPrecondition: It cannot be read, or qemu-img is not installed.
    """
    shown = name or str(path)
    descriptor = await in_thread(lambda: _open(path, shown))
    try:
        head, size = await in_thread(lambda: (os.pread(descriptor, HEAD, 0), os.fstat(descriptor).st_size))
        found = inspect(shown, head, size, declared)
        opened = f"/proc/self/fd/{descriptor}"
        info = await _info(shown, descriptor, opened, found, account)
    finally:
        os.close(descriptor)
    _check_info(shown, info, found, opened)
    if info.virtual_size > max_virtual_size:
        raise ResourceExhausted(
            f"{shown}: is a disk of {info.virtual_size} bytes; {max_virtual_size} are allowed",
            remedy="use a smaller image, or raise the limit",
        )
    return DiskInfo(format=found, virtual_size=info.virtual_size, file_size=size)


def _open(path: Path, shown: str) -> int:
    try:
        # O_NONBLOCK: opening a pipe would wait for somebody who writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FailedPrecondition(f"{shown}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadDisk(f"{shown}: is not a file", remedy=_REMEDY)
    return descriptor


async def _info(shown: str, descriptor: int, opened: str, found: DiskFormat, account: str) -> _Info:
    argv = ["prlimit", f"--as={ADDRESS_SPACE}", f"--cpu={CPU_SECONDS}", "--core=0", "--fsize=0", "--"]
    argv += drop_privileges(account) if account and os.geteuid() == 0 else []
    argv += ["qemu-img", "info", "--output=json", "--force-share", "-f", found.value, "--", opened]
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
    try:
        done = await process.run(
            argv,
            timeout=TIMEOUT,
            env=env,
            cwd=Path("/"),
            output_limit=OUTPUT_LIMIT,
            pass_fds=(descriptor,),
            die_with_us=True,
        )
    except DeadlineExceeded:
        raise BadDisk(f"{shown}: qemu-img did not finish with it within {TIMEOUT:g} s", remedy=_REMEDY) from None
    except Internal:
        raise BadDisk(f"{shown}: qemu-img had more than {OUTPUT_LIMIT} bytes to say of it", remedy=_REMEDY) from None
    if done.returncode != 0:
        raise _failure(shown, done, opened, account)
    try:
        return msgspec.json.decode(done.stdout, type=_Info)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadDisk(
            f"{shown}: qemu-img answered in a form that is not understood: {error}", remedy=_REMEDY
        ) from error


def _failure(shown: str, done: process.Completed, opened: str, account: str) -> FailedPrecondition:
    words = process.last_lines(done.stderr).replace(opened, "the image").removeprefix("qemu-img: ")
    if "failed to execute qemu-img" in done.stderr:
        return FailedPrecondition(
            "the program 'qemu-img' is not installed", remedy="vmruntime doctor says which package has it"
        )
    if "Permission denied" in done.stderr:
        return FailedPrecondition(f"{shown}: cannot be read by {account or 'qemu-img'}", remedy="let it read the file")
    if done.returncode < 0:
        words = f"it was ended by signal {-done.returncode}, at the limits of {CPU_SECONDS} s and {ADDRESS_SPACE} bytes"
    return BadDisk(f"{shown}: qemu-img cannot use it: {words}", remedy=_REMEDY)


def _check_info(shown: str, info: _Info, found: DiskFormat, opened: str) -> None:
    """Check what inspect() has checked already, as QEMU sees it: two readers of one header may differ."""
    details = (info.format_specific.data if info.format_specific else None) or _Details()
    foreign = [extent.get("filename") for extent in details.extents or [] if extent.get("filename") != opened]
    why = ""
    if info.format != found.value:
        why = f"is {info.format} to qemu-img and {found.value} by its header"
    elif info.backing_filename is not None or info.full_backing_filename is not None:
        why = "has a backing file"
    elif details.data_file is not None or foreign:
        why = "keeps its data in another file"
    elif info.encrypted:
        why = "is encrypted"
    elif details.corrupt:
        why = "says of itself that it is corrupt"
    elif info.virtual_size <= 0:
        why = "is a disk without any sectors"
    if why:
        raise BadDisk(f"{shown}: {why}", remedy=_REMEDY)
