"""From a layer's blob to its EROFS image, by a program without privileges (unpacker/)."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

import vmruntime
from vmruntime.aio import process
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import FailedPrecondition, Internal, ResourceExhausted, VmruntimeError
from vmruntime.images.manifest import BadImage

_UUID_SPACE = uuid.UUID("d7c1a3f0-6f0e-5d6f-9c56-3c1d6c1c6b0e")
_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
# Longer than any layer takes; a disk that hangs is not helped by a shorter one.
_TIMEOUT = 4 * 3600.0
# The directory this package is in goes last, and nothing else of the daemon's path goes with it (python's -I and -S).
_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); from vmruntime.images.unpacker.main import main; main()"
_PACKAGES = str(Path(vmruntime.__file__).parent.parent)


class _Outcome(msgspec.Struct, frozen=True):
    """What the program says; see unpacker.main.run."""

    problem: str = ""
    message: str = ""


async def build(blob: Path, diff_id: str, work: Path, limit: int) -> Path:
    """Unpack a blob and return its EROFS image, flushed to disk; `work` is to be removed by the caller.

    The same layer gives the same bytes: the UUID comes from the diffID, and times from the tar.

    Args:
        blob: Compressed or not.
        diff_id: Digest of the uncompressed tar; checked.
        work: A directory only this user can enter; everything is made in it.
        limit: Most uncompressed bytes.

    Raises:
        BadImage: The blob is corrupt, or has what must not be.
        ResourceExhausted: It is larger than the limit, or the disk is full.
    """
    image = work / "layer.erofs"
    try:
        with _opened(blob, image) as (source, target):
            await _unpack(source, target, diff_id, limit, work)
            await in_thread(lambda: os.fsync(target))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(work) from error
        raise BadImage(f"layer {diff_id} cannot be unpacked: {error}") from error
    return image


def mount_command(image: Path, target: Path, *options: str) -> list[str]:
    """Return the mount(8) command that shows a layer in a directory, read-only and without its devices."""
    return ["mount", "-t", "erofs", "-o", ",".join(("loop", "ro", "nodev", *options)), "--", str(image), str(target)]


@contextlib.contextmanager
def _opened(blob: Path, image: Path) -> Iterator[tuple[int, int]]:
    source = os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield source, target
        finally:
            os.close(target)
    finally:
        os.close(source)


async def _unpack(source: int, target: int, diff_id: str, limit: int, work: Path) -> None:
    # It has no use for a network. Of its path, the program's own directory is all that Python looks into.
    argv = ["unshare", "--net", "--ipc", "--", sys.executable, "-I", "-S", "-c", _PROGRAM, _PACKAGES]
    argv += [str(source), str(target), diff_id, str(uuid.uuid5(_UUID_SPACE, diff_id)), str(limit)]
    done = await process.run(argv, timeout=_TIMEOUT, env=_ENVIRONMENT, cwd=Path("/"), pass_fds=(source, target))
    try:
        outcome = msgspec.json.decode(done.check().stdout, type=_Outcome)
    except msgspec.MsgspecError as error:
        raise Internal(f"the program that unpacks layers said {done.stdout[:200]!r}") from error
    if outcome.problem:
        raise _error(outcome, diff_id, work)


def _error(outcome: _Outcome, diff_id: str, work: Path) -> VmruntimeError:
    match outcome.problem:
        case "bad":
            return BadImage(f"layer {diff_id} {outcome.message}")
        case "large":
            return ResourceExhausted(
                f"layer {diff_id} {outcome.message}",
                remedy="raise images.max_layer_gib if the image is to be trusted",
            )
        case "full":
            return _no_space(work, outcome.message)
        case "missing":
            return FailedPrecondition(outcome.message, remedy="vmruntime doctor says which package has it")
        case _:
            return Internal(f"layer {diff_id} cannot be unpacked: {outcome.message}")


def _no_space(work: Path, size: str = "") -> ResourceExhausted:
    return ResourceExhausted(
        f"no space left in {work.parent} for a layer {size}".rstrip(),
        remedy="free space there, or remove unused images",
    )
