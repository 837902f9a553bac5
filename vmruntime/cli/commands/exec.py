"""`vmruntime exec`."""

from __future__ import annotations

import click

from vmruntime.cli import options
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.interactive import run_command
from vmruntime.cli.lookup import Inventory


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
def exec_(
    ctx: click.Context,
    app: App,
    container: str,
    timeout: int,
    interactive: bool,
    tty: bool,
    target: str,
    cmd: tuple[str, ...],
) -> None:
    """Run a command in a running container.

    Its exit status becomes this command's. When this command ends before it, it is killed.

    \b
    Examples:
      vmruntime exec web -- cat /etc/os-release
      vmruntime exec -it web sh
    """  # noqa: D301
    if not cmd:
        raise click.UsageError("Missing argument 'CMD'.", ctx=ctx)
    client = app.connect()
    found = Inventory.fetch(client).find_container(target, container, running=True)
    settings = app.settings.streaming
    ctx.exit(run_command(client, settings, found.id, cmd, stdin=interactive, tty=tty, timeout=timeout))
