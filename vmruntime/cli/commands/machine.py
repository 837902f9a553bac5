"""`vmruntime pause`, `resume` and `reset`: the buttons of a machine."""

from __future__ import annotations

import click

from vmruntime.cli.client import Client
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.lookup import Inventory
from vmruntime.generated import maintenance_pb2

_PODS = click.argument("pods", metavar="POD...", nargs=-1, required=True)


@click.command(short_help="Hold the machines of image pods.")
@_PODS
@pass_app
def pause(app: App, pods: tuple[str, ...]) -> None:
    """Hold the processors of image pods' machines, until `resume`.

    The guest keeps its memory and notices nothing, but that time has gone by afterwards. Its network does not answer
    meanwhile, and probes fail.
    """
    client = app.connect()
    for pod_id in _ids(client, pods):
        client.call(client.machines.PauseMachine, maintenance_pb2.PauseMachineRequest(pod_sandbox_id=pod_id))
        click.echo(pod_id)


@click.command(short_help="Let paused machines go on.")
@_PODS
@pass_app
def resume(app: App, pods: tuple[str, ...]) -> None:
    """Let machines go on that `pause` holds; others are left as they are."""
    client = app.connect()
    for pod_id in _ids(client, pods):
        client.call(client.machines.ResumeMachine, maintenance_pb2.ResumeMachineRequest(pod_sandbox_id=pod_id))
        click.echo(pod_id)


@click.command(short_help="Press the reset button of image pods' machines.")
@_PODS
@pass_app
def reset(app: App, pods: tuple[str, ...]) -> None:
    """Have the machines of image pods boot again, at once.

    The guest is not asked, and what it has not written to its disk is lost: for one that hangs. The pod goes on.
    """
    client = app.connect()
    for pod_id in _ids(client, pods):
        client.call(client.machines.ResetMachine, maintenance_pb2.ResetMachineRequest(pod_sandbox_id=pod_id))
        click.echo(pod_id)


def _ids(client: Client, pods: tuple[str, ...]) -> list[str]:
    # All are looked up before any is touched: a typing mistake resets nothing.
    inventory = Inventory.fetch(client)
    return [inventory.find_pod(text).id for text in pods]
