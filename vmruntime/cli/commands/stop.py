"""`vmruntime stop`."""

from __future__ import annotations

import click

from vmruntime.cli.context import App, pass_app
from vmruntime.cli.lookup import Inventory, pod_kinds
from vmruntime.cli.options import STOP_SECONDS, STOP_SECONDS_VM
from vmruntime.generated import cri_pb2


@click.command()
@click.option(
    "-t", "--time", "seconds", type=click.IntRange(min=0), metavar="SECONDS",
    help="Time to end by itself before it is killed."
    f"  [default: {STOP_SECONDS}, of an image pod's VM {STOP_SECONDS_VM}]",
)  # fmt: skip
@click.argument("targets", metavar="POD|CONTAINER...", nargs=-1, required=True)
@pass_app
def stop(app: App, seconds: int | None, targets: tuple[str, ...]) -> None:
    """Stop pods or containers.

    A pod's containers end first, then its network and its virtual machine are released. What is stopped already is
    left as it is.
    """
    client = app.connect()
    inventory = Inventory.fetch(client)
    kinds = pod_kinds(client) if seconds is None else {}
    # All are looked up before any is touched: a typing mistake stops nothing.
    for target in [inventory.find(text) for text in targets]:
        containers = inventory.of_pod(target.id) if isinstance(target, cri_pb2.PodSandbox) else [target]
        for container in containers:
            default = STOP_SECONDS_VM if kinds.get(container.pod_sandbox_id) == "image" else STOP_SECONDS
            timeout = default if seconds is None else seconds
            request = cri_pb2.StopContainerRequest(container_id=container.id, timeout=timeout)
            client.call(client.runtime.StopContainer, request)
        if isinstance(target, cri_pb2.PodSandbox):
            client.call(client.runtime.StopPodSandbox, cri_pb2.StopPodSandboxRequest(pod_sandbox_id=target.id))
        click.echo(target.id)
