"""The disk of one pod: a QCOW2 overlay on an image that all pods of the image share."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Literal

import msgspec

from vmruntime.aio import process
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

SECTOR = 512
LARGEST = 2**50
"""Bytes; QCOW2 with clusters of 64 KiB ends at twice as many."""

_TIMEOUT = 60.0


class _Base(msgspec.Struct, frozen=True):
    """What an overlay was made on, kept beside it: what the overlay itself says, its guest's QEMU may have written."""

    path: str
    format: str
    virtual_size: int


async def make_overlay(
    path: Path,
    base: Path,
    base_format: Literal["qcow2", "raw", "vmdk"],
    base_virtual_size: int,
    size: int,
    account: str,
) -> None:
    """Make an overlay, or keep the one that is there when it was made on this base.

    The base is not opened: it was checked when it came, and who starts the VM says again which it is.

    Args:
        path: Of the overlay; its directory exists, and only we write there.
        base: The image's file.
        base_format: Its format.
        base_virtual_size: Bytes a guest sees of it.
        size: Bytes a guest is to see; 0, or less than the base has: as many as the base has.
        account: Who VMs run as, to whom it will belong; empty: to us.

    Raises:
        InvalidArgument: It would be larger than LARGEST.
        ResourceExhausted: The host's disk is full.
        FailedPrecondition: It cannot be made.
    """
    wanted = _Base(str(base), base_format, base_virtual_size)
    if await in_thread(lambda: path.exists() and _read(_record(path)) == wanted):
        return
    new = path.with_name(f".{path.name}.new")
    bytes_ = -(-max(size, base_virtual_size) // SECTOR) * SECTOR
    if bytes_ > LARGEST:
        raise InvalidArgument(f"a root disk of {bytes_} bytes cannot be made", remedy=f"ask for at most {LARGEST}")
    try:
        await in_thread(lambda: new.unlink(missing_ok=True))
        # -u: neither opened nor believed to be there.
        argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", str(base), "-F", base_format, "--", str(new)]
        done = await process.run([*argv, str(bytes_)], timeout=_TIMEOUT, cwd=Path("/"), die_with_us=True)
        if done.returncode != 0:
            raise _failure(path, done)
        await in_thread(lambda: _publish(new, path, wanted, account))
    except OSError as error:
        raise FailedPrecondition(f"{path}: cannot be made: {error.strerror}") from error
    finally:
        await in_thread(lambda: new.unlink(missing_ok=True))


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.base")


def _read(record: Path) -> _Base | None:
    try:
        return msgspec.json.decode(record.read_bytes(), type=_Base)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _publish(new: Path, path: Path, base: _Base, account: str) -> None:
    """Put the overlay in its place; after a crash at any point of this there is none, or one with its record."""
    new.chmod(0o600)
    if account and os.geteuid() == 0:
        ids = pwd.getpwnam(account)
        os.chown(new, ids.pw_uid, ids.pw_gid)
    path.unlink(missing_ok=True)
    record = _record(path)
    _sync(path.parent)
    record.unlink(missing_ok=True)
    descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, msgspec.json.encode(base))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _sync(new)
    new.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _failure(path: Path, done: process.Completed) -> ResourceExhausted | FailedPrecondition:
    words = process.last_lines(done.stderr).removeprefix("qemu-img: ")
    if "No space left" in done.stderr or "Disk quota exceeded" in done.stderr:
        return ResourceExhausted(f"no space left in {path.parent} for a pod's disk", remedy="free space there")
    return FailedPrecondition(f"{path}: cannot be made: {words}")
