"""How things are shown: tables, times, sizes, JSON."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping
from typing import Any

import click
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

_STEPS = ((60, "second"), (60, "minute"), (24, "hour"), (7, "day"), (52, "week"))


def console() -> Console:
    """Return a console on the present stdout; as wide as needed where that is no terminal."""
    # Tables that go to a file or a pipe must not be cut at 80 columns: scripts read them.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 1000, highlight=False)


def error_console() -> Console:
    """Return a console on the present stderr."""
    return Console(file=sys.stderr, highlight=False)


def table(*columns: str) -> Table:
    """Return an empty table of the plain kind that ps(1) prints."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=True)
    return made


def add_row(to: Table, *cells: str, style: str = "") -> None:
    """Add a row of plain text: no markup, nothing that a terminal would obey."""
    to.add_row(*(Text(printable(cell)) for cell in cells), style=style)


def printable(text: str) -> str:
    """Return text with control characters replaced; what a guest says may not steer a terminal."""
    return "".join(char if char.isprintable() else "�" for char in text)


def ago(then_ns: int, now_ns: int) -> str:
    """Return how long ago a moment was, in its largest whole unit."""
    amount = max(0, (now_ns - then_ns) // 1_000_000_000)
    for size, unit in _STEPS:
        if amount < size:
            return f"{amount} {unit}{'' if amount == 1 else 's'} ago"
        amount //= size
    return f"{amount} year{'' if amount == 1 else 's'} ago"


def size(amount: int) -> str:
    """Return bytes with three or four digits and a binary unit."""
    value = float(amount)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def timestamp(ns: int) -> str | None:
    """Return nanoseconds since the epoch as RFC 3339, or None for 0, which means it has not happened."""
    if ns == 0:
        return None
    seconds, fraction = divmod(ns, 1_000_000_000)
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def plain(message: Message) -> dict[str, Any]:
    """Return a CRI message as JSON has it: numbers stay numbers, enums become names, times RFC 3339."""
    shown: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            shown[field.name] = {str(key): _plain_value(field, item) for key, item in value.items()}
        elif field.is_repeated:
            shown[field.name] = [_plain_value(field, item) for item in value]
        elif field.message_type is not None:
            shown[field.name] = plain(value) if message.HasField(field.name) else None
        elif field.name.endswith("_at"):
            shown[field.name] = timestamp(value)
        else:
            shown[field.name] = _plain_value(field, value)
    return shown


def info(values: Mapping[str, str]) -> dict[str, Any]:
    """Return a verbose status's info, whose values are JSON by convention."""
    decoded: dict[str, Any] = {}
    for key, value in values.items():
        try:
            decoded[key] = json.loads(value)
        except ValueError:
            decoded[key] = value
    return decoded


def _plain_value(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    return value
