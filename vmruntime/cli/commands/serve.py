"""`vmruntime serve`."""

from __future__ import annotations

import asyncio

import click
import msgspec

from vmruntime.cli.context import App, pass_app


@click.command()
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Instead of log.level.")
@click.option("--check", is_flag=True, help="Read the configuration, say whether it can be used, and end.")
@pass_app
def serve(app: App, log_level: str | None, check: bool) -> None:
    """Run the daemon, until SIGTERM or Ctrl-C.

    Pods go on running when the daemon ends; the next one takes them over. Its messages go to stderr.
    """
    settings = app.settings
    if log_level is not None:
        log = msgspec.structs.replace(settings.log, level=log_level)
        settings = msgspec.structs.replace(settings, log=log)
    if check:
        click.echo("the configuration can be used")
        return
    # The daemon's modules take longer to import than most commands take to run.
    from vmruntime.daemon.main import serve as run_daemon

    asyncio.run(run_daemon(settings))
