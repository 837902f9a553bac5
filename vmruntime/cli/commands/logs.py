"""`vmruntime logs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from vmruntime.cli import options
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.crilog import Entry, LogFile, last_lines
from vmruntime.cli.follow import Follower, printer, report_malformed, status_of
from vmruntime.cli.lookup import Inventory, describe
from vmruntime.errors import FailedPrecondition, NotFound, PermissionDenied


@click.command(short_help="Show what a container wrote.")
@options.container
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written later, until the container ends.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Begin with the last N lines.")
@click.option("-t", "--timestamps", is_flag=True, help="Begin each line with its time.")
@click.argument("target", metavar="POD|CONTAINER")
@pass_app
def logs(app: App, container: str, follow: bool, tail: int | None, timestamps: bool, target: str) -> None:
    """Show what a container wrote: its stdout on stdout, its stderr on stderr."""
    client = app.connect()
    found = Inventory.fetch(client).find_container(target, container)
    path = status_of(client, found.id).log_path
    if not path:
        raise FailedPrecondition(f"container {describe(found)} was made without a log")
    if not follow and not Path(path).exists():
        raise NotFound(f"the log of container {describe(found)} is gone: {path}")
    log = LogFile(Path(path))
    output = printer(timestamps=timestamps)
    try:
        if tail is not None:
            output.write(last_lines(_all(log), tail))
        if follow:
            Follower(client, found.id, log, output).until_exit()
        else:
            output.write(_all(log))
    except PermissionError:
        raise PermissionDenied(f"{path}: permission denied", remedy="run as root") from None
    finally:
        log.close()
        report_malformed(log)


def _all(log: LogFile) -> Iterator[Entry]:
    while entries := log.read():
        yield from entries
