"""`vmruntime console`."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

import click

from vmruntime.cli.client import Client
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.interactive import join_container
from vmruntime.cli.lookup import Inventory, describe, pod_info
from vmruntime.cli.terminal import is_terminal
from vmruntime.errors import FailedPrecondition, NotFound, PermissionDenied
from vmruntime.generated import cri_pb2

_INTERVAL = 0.1
_CHUNK = 64 * 1024


@click.command(short_help="Print or join a virtual machine's serial console.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what appears later, until the pod stops.")
@click.option("-i", "--interactive", is_flag=True, help="Join it: what is typed reaches the guest (image pods).")
@click.argument("pod")
@pass_app
def console(app: App, follow: bool, interactive: bool, pod: str) -> None:
    """Print the serial console of a pod's virtual machine: its kernel's messages and its agent's.

    The first place to look when a pod does not start.

    With -i it is joined, as by `attach -it`, in pods of kind image, whose guests have a login there: it shows what
    comes from now on, until the VM powers off. Ctrl-] or Ctrl-P Ctrl-Q leaves it.
    """
    if follow and interactive:
        raise click.UsageError("--follow and --interactive exclude each other: what is joined is followed")
    client = app.connect()
    found = Inventory.fetch(client).find_pod(pod)
    if interactive:
        _join(app, client, found)
    else:
        _print(client, found, app.paths.sandbox(found.id) / "console.log", follow)


def _join(app: App, client: Client, pod: cri_pb2.PodSandbox) -> None:
    if pod_info(client, pod.id).get("kind") != "image":
        raise FailedPrecondition(
            f"pod {describe(pod)} is of containers, and nobody listens on its console",
            remedy=f"vmruntime attach {pod.metadata.name}, or leave out -i",
        )
    vm = Inventory.fetch(client).find_container(pod.id, running=True)
    if is_terminal():
        click.echo(f"vmruntime: the console of {describe(pod)}; Ctrl-] leaves", err=True)
    join_container(client, app.settings.streaming, vm.id, stdin=True, tty=True, console=True)


def _print(client: Client, pod: cri_pb2.PodSandbox, path: Path, follow: bool) -> None:
    output = sys.stdout.buffer
    try:
        with path.open("rb", buffering=0) as file:
            _skip_hole(file.fileno())
            while True:
                # Asked before reading, so that what is written up to the pod's end is read.
                alive = follow and _is_ready(client, pod.id)
                while data := file.read(_CHUNK):
                    output.write(data)
                output.flush()
                if not alive:
                    return
                time.sleep(_INTERVAL)
    except FileNotFoundError:
        raise NotFound(
            f"pod {describe(pod)} has no console: {path} does not exist",
            remedy="it exists while the pod has a virtual machine",
        ) from None
    except PermissionError:
        raise PermissionDenied(f"{path}: permission denied", remedy="run as root") from None


def _skip_hole(fd: int) -> None:
    """Go to where the text begins: what has been taken into logs may be a hole, which reads as NULs."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:  # nothing but a hole, or nothing at all
            raise
        os.lseek(fd, 0, os.SEEK_END)


def _is_ready(client: Client, pod_id: str) -> bool:
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod_id)
    try:
        return client.call(client.runtime.PodSandboxStatus, request).status.state == cri_pb2.SANDBOX_READY
    except NotFound:
        return False
