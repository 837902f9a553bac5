"""`vmruntime attach`."""

from __future__ import annotations

import click

from vmruntime.cli import options
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.follow import status_after_streams
from vmruntime.cli.interactive import container_streams, join_container
from vmruntime.cli.lookup import Inventory
from vmruntime.generated import cri_pb2


@click.command(short_help="Join a running container's streams.")
@options.container
@click.option("--no-stdin", is_flag=True, help="Only watch.")
@click.argument("target", metavar="POD|CONTAINER")
@pass_app
@click.pass_context
def attach(ctx: click.Context, app: App, container: str, no_stdin: bool, target: str) -> None:
    """Join a running container's streams.

    What it writes from now on appears here; what is typed or piped in reaches it if it was made with stdin. Its end
    ends this command, with its exit status. Ctrl-P Ctrl-Q leaves a container with a terminal running.
    """
    client = app.connect()
    found = Inventory.fetch(client).find_container(target, container, running=True)
    stdin, tty = container_streams(client, found.id)
    if not join_container(client, app.settings.streaming, found.id, stdin=stdin and not no_stdin, tty=tty):
        return
    status = status_after_streams(client, found.id)
    if status.state == cri_pb2.CONTAINER_EXITED:
        ctx.exit(status.exit_code if 0 <= status.exit_code <= 255 else 255)
