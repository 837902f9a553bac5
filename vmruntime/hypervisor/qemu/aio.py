"""How QEMU reads and writes disks: by io_uring(7) where QEMU has it and the kernel lets the VMs' account use it, else in threads.

Linux's older asynchronous I/O (aio=native) would need O_DIRECT: layers are read through the host's page cache, which is how pods
share them.
"""

from __future__ import annotations

import json

import structlog

from vmruntime.aio.detached import drop_privileges
from vmruntime.aio.process import last_lines, run
from vmruntime.errors import DeadlineExceeded

log = structlog.get_logger(__name__)

THREADS, IO_URING = "threads", "io_uring"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
PROBE_SECONDS = 10.0


async def choose_aio(qemu: str, user: str) -> str:
    """Try io_uring with a QEMU that has no machine, in the sandbox and under the account of VMs; return what is to be used."""
    node = {"driver": "file", "node-name": "probe", "filename": "/proc/self/exe", "read-only": True, "aio": IO_URING}
    argv = [qemu, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-sandbox", SANDBOX]
    argv += ["-blockdev", json.dumps(node), "-monitor", "stdio"]
    try:
        done = await run([*drop_privileges(user), *argv], input=b"quit\n", timeout=PROBE_SECONDS)
    except DeadlineExceeded as error:
        why = str(error)
    else:
        if done.returncode == 0:
            return IO_URING
        why = last_lines(done.stderr)
    log.info("disks are read and written in threads: no io_uring", why=why)
    return THREADS
