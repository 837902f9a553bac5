"""From a layer's blob to its EROFS image (tar(1), mkfs.erofs(1))."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import uuid
from pathlib import Path

from vmruntime.aio import pipeline, process
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import FailedPrecondition, ResourceExhausted, VmruntimeError
from vmruntime.images import tree
from vmruntime.images.manifest import BadImage
from vmruntime.images.streams import CheckedTar

_UUID_SPACE = uuid.UUID("d7c1a3f0-6f0e-5d6f-9c56-3c1d6c1c6b0e")
# mkfs.erofs takes this as the time of the file system and as the latest a file may have (reproducible-builds.org);
# being far ahead (2106), it leaves files alone.
_EPOCH = str(2**32 - 1)
_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
# Longer than any layer takes; a disk that hangs is not helped by a shorter one.
_MKFS_TIMEOUT = 4 * 3600.0


async def build(blob: Path, diff_id: str, work: Path, limit: int) -> Path:
    """Unpack a blob and return its EROFS image, flushed to disk; `work` is to be removed by the caller.

    The same layer gives the same bytes: the UUID comes from the diffID, and times from the tar.

    Args:
        blob: Compressed or not.
        diff_id: Digest of the uncompressed tar; checked.
        work: A directory only this user can enter; everything is made in it.
        limit: Most uncompressed bytes.

    Raises:
        BadImage: The blob is corrupt, or unpacks to what must not be.
        ResourceExhausted: It is larger than the limit, or the disk is full.
    """
    root, image = work / "tree", work / "layer.erofs"
    try:
        started = await in_thread(lambda: _make_root(root))
        size = await _unpack(blob, diff_id, root, limit)
        await in_thread(lambda: tree.finish(root, limit, started))
        await _mkfs(root, image, diff_id, size)
        await in_thread(lambda: _settle(root, image))
    except OSError as error:
        raise _disk_error(error, work, blob) from error
    return image


def mount_command(image: Path, target: Path, *options: str) -> list[str]:
    """Return the mount(8) command that shows a layer in a directory, read-only and without its devices."""
    return ["mount", "-t", "erofs", "-o", ",".join(("loop", "ro", "nodev", *options)), "--", str(image), str(target)]


async def _unpack(blob: Path, diff_id: str, root: Path, limit: int) -> int:
    """Unpack into an empty directory and return the tar's size in bytes.

    GNU tar drops leading slashes, refuses "..", and makes links that could lead outside only after everything
    else is in place, so nothing can be written through them.
    """
    checked = CheckedTar(blob, diff_id, limit)
    # A sparse member can be any size with a few bytes of tar; no file may be larger than the layer.
    argv = ["prlimit", f"--fsize={limit}", "tar", "--extract", "--file=-", f"--directory={root}"]
    argv += [
        "--numeric-owner",
        "--same-owner",
        "--same-permissions",
        "--delay-directory-restore",
        "--xattrs",
        "--no-acls",
        "--no-selinux",
    ]
    # trusted.overlay.* in a layer would steer the guest's overlayfs (redirects, metadata-only copies).
    argv += ["--xattrs-include=user.*", "--xattrs-include=security.capability", "--warning=no-unknown-keyword"]
    done = await pipeline.feed(argv, lambda: iter(checked), env=_ENVIRONMENT)
    if done.returncode != 0 and checked.size > 0:
        raise _tar_error(done, diff_id, root, checked.size)
    return checked.size


async def _mkfs(root: Path, image: Path, diff_id: str, size: int) -> None:
    identity = uuid.uuid5(_UUID_SPACE, diff_id)
    argv = ["mkfs.erofs", "-U", str(identity), "--quiet", str(image), str(root)]
    env = _ENVIRONMENT | {"SOURCE_DATE_EPOCH": _EPOCH}
    done = await process.run(argv, timeout=_MKFS_TIMEOUT, env=env, die_with_us=True)
    if done.returncode != 0 and "No space left" in done.stderr:
        raise _no_space(image.parent, size)
    done.check()


def _make_root(root: Path) -> int:
    """Make the directory and return the time by the file system's clock, which lags behind the system's."""
    root.mkdir()
    root.chmod(0o755)  # what the image's root has unless the tar has an entry for it
    return root.stat().st_mtime_ns


def _settle(root: Path, image: Path) -> None:
    descriptor = os.open(image, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(root)


def _tar_error(done: process.Completed, diff_id: str, root: Path, size: int) -> VmruntimeError:
    if "prlimit: failed to execute tar" in done.stderr:
        return FailedPrecondition(
            "the program 'tar' is not installed", remedy="vmruntime doctor says which package has it"
        )
    # tar reports a disk that fills up in the middle of a write as a short one.
    if re.search(r"No space left|Disk quota exceeded|Wrote only \d+ of \d+ bytes", done.stderr):
        return _no_space(root.parent, size)
    if done.returncode == -signal.SIGXFSZ or "File too large" in done.stderr:
        return ResourceExhausted(f"layer {diff_id} has a file larger than images.max_layer_gib")
    return BadImage(f"layer {diff_id} cannot be unpacked: {process.last_lines(done.stderr)}")


def _disk_error(error: OSError, work: Path, blob: Path) -> VmruntimeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(work, 0)
    return BadImage(f"layer {blob.name} cannot be unpacked: {error}")


def _no_space(directory: Path, size: int) -> ResourceExhausted:
    needed = f" for a layer of {size} bytes" if size else ""
    return ResourceExhausted(
        f"no space left in {directory.parent}{needed}", remedy="free space there, or remove unused images"
    )
