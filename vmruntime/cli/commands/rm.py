"""`vmruntime rm`."""

from __future__ import annotations

import click

from vmruntime.cli.context import App, pass_app
from vmruntime.cli.logdirs import remove_log_directory
from vmruntime.cli.lookup import Inventory, describe
from vmruntime.errors import FailedPrecondition
from vmruntime.generated import cri_pb2


@click.command(short_help="Remove stopped pods or containers.")
@click.option("-f", "--force", is_flag=True, help="Also what is running: it is stopped first.")
@click.argument("targets", metavar="POD|CONTAINER...", nargs=-1, required=True)
@pass_app
def rm(app: App, force: bool, targets: tuple[str, ...]) -> None:
    """Remove stopped pods or containers, with their logs when `vmruntime run` made them."""
    client = app.connect()
    inventory = Inventory.fetch(client)
    found = [inventory.find(text) for text in targets]
    for target in found:
        if not force and _is_running(target):
            raise FailedPrecondition(f"{describe(target)} is running", remedy="stop it first, or use rm --force")
    for target in found:
        if isinstance(target, cri_pb2.PodSandbox):
            client.call(client.runtime.StopPodSandbox, cri_pb2.StopPodSandboxRequest(pod_sandbox_id=target.id))
            client.call(client.runtime.RemovePodSandbox, cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=target.id))
            remove_log_directory(app.logs, target)
        else:
            client.call(client.runtime.RemoveContainer, cri_pb2.RemoveContainerRequest(container_id=target.id))
        click.echo(target.id)


def _is_running(target: cri_pb2.PodSandbox | cri_pb2.Container) -> bool:
    if isinstance(target, cri_pb2.PodSandbox):
        return target.state == cri_pb2.SANDBOX_READY
    return target.state == cri_pb2.CONTAINER_RUNNING
