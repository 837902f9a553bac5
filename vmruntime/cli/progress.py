"""Showing that something takes its time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vmruntime.cli.render import error_console, printable


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner and the time gone by on stderr while the block runs; nothing where that is no terminal."""
    console = error_console()
    if not console.is_terminal:
        yield
        return
    # CRI tells nothing of a pull's progress until it has ended, so there is no bar to draw.
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(printable(what), total=None)
        yield
