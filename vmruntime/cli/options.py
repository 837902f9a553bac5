"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

STOP_SECONDS, STOP_SECONDS_VM = 10, 30
"""How long what is stopped has to end by itself: a container, and a guest of an image pod, which shuts down."""

F = TypeVar("F", bound=Callable[..., Any])


def output(*formats: str) -> Callable[[F], F]:
    """Return the -o option with these formats, the first of which is the default."""
    return click.option(
        "-o", "--output", type=click.Choice(formats), default=formats[0], show_default=True, help="How to show it."
    )


def container(function: F) -> F:
    """Add --container, which chooses among a pod's containers."""
    return click.option("-c", "--container", default="", metavar="NAME", help="Which container of the pod.")(function)


def terminal(function: F) -> F:
    """Add -i and -t."""
    function = click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")(function)
    return click.option("-i", "--interactive", is_flag=True, help="Pass stdin on.")(function)


def dashes(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Drop the -- that separates a command from what comes before it."""
    return value[1:] if value[:1] == ("--",) else value
