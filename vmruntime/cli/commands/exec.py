"""`vmruntime exec`."""

from __future__ import annotations

import sys

import click

from vmruntime.cli import options
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.lookup import Inventory
from vmruntime.generated import cri_pb2


@click.command("exec", context_settings={"allow_interspersed_args": False})
@options.container
@click.option(
    "--timeout", type=click.IntRange(min=0), default=0, metavar="SECONDS", help="Kill the command after this time."
)
@options.terminal
@click.argument("target", metavar="POD|CONTAINER")
@click.argument("cmd", nargs=-1, required=True, callback=options.dashes)
@pass_app
@click.pass_context
def exec_(ctx: click.Context, app: App, container: str, timeout: int, target: str, cmd: tuple[str, ...]) -> None:
    """Run a command in a running container.

    What it writes appears when it has ended (at most 16 MiB each of stdout and stderr), and its exit status becomes
    this command's. It has no stdin.

    \b
    Example:
      vmruntime exec web -- cat /etc/os-release
    """  # noqa: D301
    if not cmd:
        raise click.UsageError("Missing argument 'CMD'.", ctx=ctx)
    client = app.connect()
    found = Inventory.fetch(client).find_container(target, container, running=True)
    request = cri_pb2.ExecSyncRequest(container_id=found.id, cmd=cmd, timeout=timeout)
    answer = client.call(client.runtime.ExecSync, request)
    outputs = ((sys.stdout.buffer, answer.stdout), (sys.stderr.buffer, answer.stderr))
    for stream, data in outputs:
        stream.write(data)
        stream.flush()
    ctx.exit(answer.exit_code if 0 <= answer.exit_code <= 255 else 255)
