"""`vmruntime ssh`."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import click

from vmruntime.cli import options
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.lookup import Inventory, describe
from vmruntime.cli.progress import working
from vmruntime.errors import DeadlineExceeded, FailedPrecondition, NotFound
from vmruntime.generated import cri_pb2

DEFAULT_USER = "root"
_INTERVAL = 0.5


@click.command(context_settings={"allow_interspersed_args": False}, short_help="Log in to a pod by ssh.")
@click.option("-l", "--login", "user", default="", metavar="USER", help="Log in as.  [default: root]")
@click.option(
    "-i", "--identity", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="Private key, instead of those ssh finds by itself.",
)  # fmt: skip
@click.option("-p", "--port", type=click.IntRange(1, 65535), default=22, show_default=True, help="Of the guest's sshd.")
@click.option(
    "--wait", type=click.IntRange(min=0), default=0, metavar="SECONDS",
    help="Wait at most so long for the guest's sshd: one that has just been started boots first.",
)  # fmt: skip
@click.argument("pod", metavar="[USER@]POD")
@click.argument("cmd", nargs=-1, callback=options.dashes)
@pass_app
def ssh(app: App, user: str, identity: Path | None, port: int, wait: int, pod: str, cmd: tuple[str, ...]) -> None:
    """Log in to a pod by its address, or run CMD there; the exit status is ssh's.

    The pod's host keys are kept in a file of its own, since pods get each other's addresses: the first key that is
    seen is believed, and another one later is not.

    \b
    Examples:
      vmruntime ssh --wait 120 debian
      vmruntime ssh admin@debian -- uptime
    """  # noqa: D301
    program = shutil.which("ssh")
    if program is None:
        raise NotFound("no ssh client is installed", remedy="apt install openssh-client")
    before, at, name = pod.rpartition("@")
    client = app.connect()
    found = Inventory.fetch(client).find_pod(name)
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=found.id)
    address = client.call(client.runtime.PodSandboxStatus, request).status.network.ip
    if not address:
        raise FailedPrecondition(
            f"pod {describe(found)} has no address", remedy="it has stopped, or is on the host's network"
        )
    # The directory is root's alone, and goes with the pod.
    known_hosts = app.paths.sandbox(found.id) / "known_hosts"
    if wait:
        _wait_for(address, port, wait)
    argv = [
        program,
        *_options(known_hosts, found.id, identity),
        "-p", str(port), "-l", user or (before if at else "") or DEFAULT_USER,
        # Nothing after this is an option to ssh, whatever the command begins with.
        "--", address, *cmd,
    ]  # fmt: skip
    client.close()
    os.execv(program, argv)


def _options(known_hosts: Path, pod_id: str, identity: Path | None) -> list[str]:
    given = {
        "UserKnownHostsFile": str(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": pod_id[:13],
        "StrictHostKeyChecking": "accept-new",
        "LogLevel": "ERROR",
    }
    if identity is not None:
        given |= {"IdentityFile": str(identity), "IdentitiesOnly": "yes"}
    return [word for name, value in given.items() for word in ("-o", f"{name}={_quoted(value)}")]


def _quoted(value: str) -> str:
    """Return a value as ssh_config(5) takes it: several words are several values, and % begins a token."""
    return '"' + value.replace("%", "%%") + '"' if any(char in value for char in ' \t%"') else value


def _wait_for(address: str, port: int, seconds: int) -> None:
    """Wait until a server there has said something, as an sshd does at once.

    Raises:
        DeadlineExceeded: None has.
    """
    deadline = time.monotonic() + seconds
    why = ""
    with working("waiting for the guest's sshd"):
        while (left := deadline - time.monotonic()) > 0:
            try:
                with socket.create_connection((address, port), timeout=min(left, 5.0)) as probe:
                    probe.settimeout(min(left, 5.0))
                    if probe.recv(4):
                        return
                why = "it closes connections"
            except OSError as error:
                why = error.strerror or str(error)
            time.sleep(_INTERVAL)
    raise DeadlineExceeded(
        f"no sshd on {address} port {port} after {seconds} s: {why}",
        remedy="vmruntime console shows how far the guest has come",
    )
