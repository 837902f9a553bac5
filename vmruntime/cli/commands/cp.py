"""`vmruntime cp`."""

from __future__ import annotations

from pathlib import Path

import click

from vmruntime.cli import options
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.copying import Copier, Place
from vmruntime.cli.lookup import Inventory


@click.command(short_help="Copy files to or from a container.")
@options.container
@click.argument("source")
@click.argument("target")
@pass_app
@click.pass_context
def cp(ctx: click.Context, app: App, container: str, source: str, target: str) -> None:
    """Copy a file or directory between this machine and a running container.

    One of the two is POD:PATH (or CONTAINER:PATH). Into an existing directory it is copied under its own name, else
    under the one given. The image needs a tar.

    \b
    Examples:
      vmruntime cp site.conf web:/etc/nginx/conf.d/
      vmruntime cp web:/var/log/nginx ./logs
    """  # noqa: D301
    here, there = Place.parse(source), Place.parse(target)
    if bool(here.target) == bool(there.target):
        raise click.UsageError("exactly one of SOURCE and TARGET has to be POD:PATH", ctx=ctx)
    client = app.connect()
    found = Inventory.fetch(client).find_container(here.target or there.target, container, running=True)
    copier = Copier(client, app.settings.streaming, found.id)
    if there.target:
        copier.upload(Path(here.path), there.path)
    else:
        copier.download(here.path, Path(there.path))
