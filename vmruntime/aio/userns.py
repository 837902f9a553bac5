"""User namespaces as descriptors: what mount_setattr(2) wants for an id-mapped mount (user_namespaces(7))."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from vmruntime.errors import FailedPrecondition, Internal

IdMap = tuple[int, int, int]
"""First id inside, first id outside, how many."""

NS_GET_USERNS = 0xB701  # linux/nsfs.h
START_TIMEOUT = 20.0
_REMEDY = "the host's kernel has to have user namespaces, and sysctl user.max_user_namespaces more than 0"


@contextlib.asynccontextmanager
async def user_namespace(uids: IdMap, gids: IdMap, *, network: bool = False) -> AsyncIterator[int]:
    """Yield the pid of a process in a user namespace with these ids; it waits, and ends when the block is left.

    Args:
        uids: Its users.
        gids: Its groups.
        network: It is in a new network namespace as well, which the user namespace owns.

    Raises:
        FailedPrecondition: The kernel refuses.
    """
    flags = ["--user", *(["--net"] if network else [])]
    try:
        process = await asyncio.create_subprocess_exec(
            *["unshare", *flags, "--", "/bin/sh", "-c", "echo; read -r _"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise FailedPrecondition("the program 'unshare' is not installed", remedy="install util-linux") from None
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(START_TIMEOUT):
                if not await process.stdout.readline():
                    why = (await process.stderr.read()).decode(errors="replace").strip()
                    raise FailedPrecondition(f"a user namespace cannot be made: {why}", remedy=_REMEDY)
        except TimeoutError:
            raise Internal(f"unshare did not start within {START_TIMEOUT:g} s") from None
        for name, ids in (("uid_map", uids), ("gid_map", gids)):
            try:
                Path(f"/proc/{process.pid}/{name}").write_text(" ".join(map(str, ids)))
            except OSError as error:
                raise FailedPrecondition(
                    f"a user namespace with the {name} {ids} cannot be made: {error.strerror}", remedy=_REMEDY
                ) from error
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await asyncio.shield(process.wait())


@contextlib.asynccontextmanager
async def user_namespace_fd(uids: IdMap, gids: IdMap) -> AsyncIterator[int]:
    """Yield a descriptor of a user namespace with these ids.

    Raises:
        FailedPrecondition: The kernel refuses.
    """
    with contextlib.ExitStack() as undo:
        async with user_namespace(uids, gids) as pid:
            fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, fd)  # here already: the end of the process is awaited, which may be cancelled
        yield fd


@contextlib.contextmanager
def owner_of(namespace: Path) -> Iterator[int]:
    """Yield a descriptor of the user namespace that owns another namespace (ioctl_ns(2))."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        owner = fcntl.ioctl(fd, NS_GET_USERNS)
    finally:
        os.close(fd)
    try:
        yield owner
    finally:
        os.close(owner)
