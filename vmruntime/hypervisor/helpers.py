"""Processes beside a VM's QEMU, and the one directory that the account they run as may write."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import stat
from pathlib import Path

from vmruntime import tracing
from vmruntime.aio.detached import DetachedProcess
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import Recorder, VmSpec
from vmruntime.hypervisor.vsock import connect_backend, helper_argv, helper_directory, hybrid_socket

SCREEN_SOCKET = "vnc.sock"
"""What QEMU listens for VNC on, in the helpers' directory."""


def make_helper_directory(directory: Path, user: str) -> Path:
    """Make the helpers' directory of a VM, which nobody else can enter; it is there already: success.

    Raises:
        FailedPrecondition: There is no such account.
    """
    account = account_of(user)
    made = helper_directory(directory)
    made.mkdir(mode=0o700, exist_ok=True)
    os.chown(made, account.pw_uid, account.pw_gid)
    return made


def account_of(user: str) -> pwd.struct_passwd:
    """Return the account that QEMU and its helpers run as.

    Raises:
        FailedPrecondition: There is none of this name.
    """
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise FailedPrecondition(
            f"hypervisor.user: no account named {user!r}", remedy="create it, or run make setup"
        ) from None


@tracing.timed("vm.vsock")
async def start_vsock(
    spec: VmSpec, program: str, user: str, record: Recorder, undo: contextlib.AsyncExitStack
) -> tuple[DetachedProcess, socket.socket]:
    """Start vhost-device-vsock for a VM.

    Args:
        spec: The VM.
        program: Path of vhost-device-vsock.
        user: Account it runs as.
        record: Told of the process before it runs.
        undo: Gets what ends the process.

    Returns:
        The process, and a connection for QEMU, which is the caller's to close.
    """
    directory = make_helper_directory(spec.directory, user)
    log = spec.directory / "vsock.log"
    backend = directory / "backend.sock"
    helper = await DetachedProcess.spawn(
        helper_argv(program, spec.cid, backend, hybrid_socket(spec.directory)),
        record=lambda identity: record("vsock", identity),
        log=log,
        user=user,
    )
    undo.push_async_callback(helper.end)
    return helper, await connect_backend(helper, backend, log)


def take_screen(directory: Path) -> None:
    """Put the VNC socket that QEMU listens on where it is looked for, and make it root's.

    Raises:
        HypervisorError: It is not there.
    """
    made, target = helper_directory(directory) / SCREEN_SOCKET, directory / SCREEN_SOCKET
    try:
        made.replace(target)
        # It comes from a directory that QEMU can write: a link there would lead elsewhere.
        if not stat.S_ISSOCK(target.lstat().st_mode):
            target.unlink()
            raise HypervisorError(f"the VNC server's socket {made} is none")
        os.chown(target, 0, 0)
        target.chmod(0o600)
    except OSError as error:
        raise HypervisorError(f"the VNC server's socket {made} is not there: {error.strerror}") from error
