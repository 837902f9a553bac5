"""`vmruntime diag`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from vmruntime.cli.context import App, pass_app
from vmruntime.cli.diag import collect
from vmruntime.cli.doctor.host import Host
from vmruntime.cli.progress import working
from vmruntime.cli.render import printable


@click.command(short_help="Collect what a bug report needs.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.tar.gz",
    help="Where to write it.  [default: vmruntime-diag-TIME.tar.gz]",
)  # fmt: skip
@click.argument("pod", required=False, default="")
@pass_app
def diag(app: App, output: Path | None, pod: str) -> None:
    """Write an archive of what a bug report about POD needs, or about all pods.

    It has versions, configuration, what `doctor` says, and of each pod what the daemon tells, the logs of its VM, command
    lines, network and disks. Environment variables, arguments of containers, user-data and seeds are left out; what a
    guest has printed on its console is not, so look through it. Works without a daemon, too. Run it as root.
    """
    path = output or Path(f"vmruntime-diag-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    with working("collecting"):
        errors = collect(app, pod, path, Host())
    for error in errors:
        click.echo(f"vmruntime: {printable(error)}", err=True)
    click.echo(path)
