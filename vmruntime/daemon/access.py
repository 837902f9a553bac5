"""What VMs' account must be able to reach, checked before the first pod fails on it."""

from __future__ import annotations

from pathlib import Path

from vmruntime.aio.detached import drop_privileges
from vmruntime.aio.process import run
from vmruntime.errors import FailedPrecondition


async def check_passage(directory: Path, user: str) -> None:
    """Return if an account may pass through a directory and all above it.

    It is tried rather than read off the permission bits, which ACLs and security modules overrule.

    Raises:
        FailedPrecondition: It may not; the message names the first directory that stops it.
    """
    if await _may_pass(directory, user):
        return
    for above in (*reversed(directory.parents), directory):
        if not await _may_pass(above, user):
            raise FailedPrecondition(
                f"hypervisor.user: {user} cannot pass through {above}, and what QEMU needs is below it in {directory}",
                remedy=f"chmod o+x {above}, or set run and root to other directories",
            )


async def _may_pass(directory: Path, user: str) -> bool:
    # Changing into it is what a path lookup needs, and no more.
    done = await run([*drop_privileges(user), "sh", "-c", 'cd -- "$1"', "sh", str(directory)], timeout=10)
    return done.returncode == 0
