"""virtiofsd, the process that serves a pod's share to its VM (vhost-user, virtio-fs)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vmruntime.aio.process import run
from vmruntime.errors import FailedPrecondition

# QEMU's own one (Debian 12, Ubuntu 22.04) and the one in Rust (later releases), where distributions put them.
PROGRAMS = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd", "/usr/local/bin/virtiofsd")
PROBE_TIMEOUT = 10.0


def find_virtiofsd(configured: str) -> str:
    """Return the program.

    Raises:
        FailedPrecondition: It is nowhere to be found.
    """
    candidates = (configured,) if configured else PROGRAMS
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    found = shutil.which(configured or "virtiofsd")
    if found:
        return found
    raise FailedPrecondition(
        f"virtiofsd is not on this host, so pods in VMs cannot have volumes (looked for {', '.join(candidates)})",
        remedy="install qemu-system-common (Debian 12) or virtiofsd (later), or set volumes.virtiofsd",
    )


async def is_rust(program: str) -> bool:
    """Whether it is the implementation in Rust, whose options differ."""
    done = await run([program, "--version"], timeout=PROBE_TIMEOUT)
    return b"FUSE kernel interface" not in done.stdout


def virtiofsd_argv(program: str, *, rust: bool, root: Path, fd: int) -> list[str]:
    """Return the command that exports a directory on a listening vhost-user socket.

    announce-submounts gives each bind mount a file system of its own in the guest, so inode numbers do not collide and
    mounts made later are found. The cache is kept for a second: what changes on the host is seen soon.
    """
    if rust:
        return [
            program,
            f"--fd={fd}",
            f"--shared-dir={root}",
            "--sandbox=namespace",
            "--cache=auto",
            "--announce-submounts",
            "--xattr",
            "--log-level=warn",
        ]
    options = "sandbox=namespace,cache=auto,announce_submounts,xattr,log_level=warn"
    return [program, "-f", f"--fd={fd}", "-o", f"source={root}", "-o", options]
