"""`vmruntime console`."""

from __future__ import annotations

import sys
import time

import click

from vmruntime.cli.client import Client
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.lookup import Inventory, describe
from vmruntime.errors import NotFound, PermissionDenied
from vmruntime.generated import cri_pb2

_INTERVAL = 0.1
_CHUNK = 64 * 1024


@click.command(short_help="Print a virtual machine's serial console.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what appears later, until the pod stops.")
@click.argument("pod")
@pass_app
def console(app: App, follow: bool, pod: str) -> None:
    """Print the serial console of a pod's virtual machine: its kernel's messages and its agent's.

    The first place to look when a pod does not start.
    """
    client = app.connect()
    found = Inventory.fetch(client).find_pod(pod)
    path = app.paths.sandbox(found.id) / "console.log"
    output = sys.stdout.buffer
    try:
        with path.open("rb", buffering=0) as file:
            while True:
                # Asked before reading, so that what is written up to the pod's end is read.
                alive = follow and _is_ready(client, found.id)
                while data := file.read(_CHUNK):
                    output.write(data)
                output.flush()
                if not alive:
                    return
                time.sleep(_INTERVAL)
    except FileNotFoundError:
        raise NotFound(
            f"pod {describe(found)} has no console: {path} does not exist",
            remedy="it exists while the pod has a virtual machine",
        ) from None
    except PermissionError:
        raise PermissionDenied(f"{path}: permission denied", remedy="run as root") from None


def _is_ready(client: Client, pod_id: str) -> bool:
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod_id)
    try:
        return client.call(client.runtime.PodSandboxStatus, request).status.state == cri_pb2.SANDBOX_READY
    except NotFound:
        return False
