"""The pod's writable disk."""

from __future__ import annotations

import os
from pathlib import Path

from vmruntime import tracing
from vmruntime.aio import memfile
from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.process import run
from vmruntime.errors import ResourceExhausted

SERIAL = "scratch"
HEADROOM_BYTES = 256 * 1024 * 1024
"""Do not start a pod on a disk that has less than this left: its first writes would fail in the guest."""


@tracing.timed("vm.scratch")
async def make_scratch(path: Path, gib: int) -> None:
    """Make a sparse ext4 image of `gib` GiB.

    No journal: the disk lives exactly as long as its VM. Inode tables are zeroed lazily and freed
    blocks are given back to the host, so the file stays as small as what the pod really wrote.

    Raises:
        ResourceExhausted: The host's disk is nearly full.
    """
    _make_file(path, gib)
    options = "lazy_itable_init=1,discard,root_owner=0:0"
    features = "^has_journal,^resize_inode"
    argv = ["mkfs.ext4", "-q", "-F", "-m", "0", "-E", options, "-O", features, "-i", "32768", str(path)]
    (await run(argv, timeout=60, awaited=True)).check()


async def copy_scratch(path: Path, gib: int, source: int) -> None:
    """Make a copy of a scratch disk of the same size, as sparse as that one.

    Args:
        path: Where.
        gib: Its size.
        source: The other one, open.

    Raises:
        ResourceExhausted: The host's disk is nearly full.
    """

    def copy() -> None:
        _make_file(path, gib)
        with path.open("r+b") as file:
            memfile.copy(source, file.fileno())

    await in_thread(copy)


def _make_file(path: Path, gib: int) -> None:
    usage = os.statvfs(path.parent)
    free = usage.f_bavail * usage.f_frsize
    if free < HEADROOM_BYTES:
        raise ResourceExhausted(
            f"no disk space for the pod's writable layer: {free // 1024**2} MiB are free in {path.parent}",
            remedy=f"free at least {HEADROOM_BYTES // 1024**2} MiB there",
        )
    with path.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(gib * 1024**3)
