"""`vmruntime version`."""

from __future__ import annotations

import click

from vmruntime import __version__
from vmruntime.cli import options
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.render import plain, print_json
from vmruntime.errors import PermissionDenied, Unavailable
from vmruntime.generated import cri_pb2


@click.command(short_help="Show the versions of command and daemon.")
@options.output("text", "json")
@pass_app
def version(app: App, output: str) -> None:
    """Show the versions of this command and of the daemon, if one runs."""
    daemon: cri_pb2.VersionResponse | None = None
    why = ""
    try:
        client = app.connect()
        daemon = client.call(client.runtime.Version, cri_pb2.VersionRequest(version="v1"), timeout=10)
    except (Unavailable, PermissionDenied) as error:
        why = error.message
    if output == "json":
        print_json({"client": __version__, "daemon": plain(daemon) if daemon is not None else None})
        return
    click.echo(f"client  {__version__}")
    if daemon is None:
        click.echo(f"daemon  {why}")
    else:
        api = daemon.runtime_api_version
        click.echo(f"daemon  {daemon.runtime_name} {daemon.runtime_version}, CRI {api}, on {app.socket}")
