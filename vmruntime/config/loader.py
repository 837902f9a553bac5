"""Reads the configuration file; every complaint names the file, the key, the value and a remedy."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from vmruntime.config.checks import problems
from vmruntime.config.settings import Settings
from vmruntime.errors import InvalidArgument, NotFound, PermissionDenied, VmruntimeError

DEFAULT_FILE = Path("/etc/vmruntime/config.toml")


def load(path: Path | None = None, *, default: Path = DEFAULT_FILE) -> Settings:
    """Return the settings of a file.

    Args:
        path: The file somebody asked for; it must exist. None reads `default`, and where that does not exist
            the built-in defaults hold.
        default: The file read when nobody named one.

    Raises:
        NotFound: `path` does not exist.
        PermissionDenied: The file cannot be read.
        InvalidArgument: The file is not TOML, has an unknown key, or a value that cannot be used.
    """
    chosen = default if path is None else path
    try:
        text = chosen.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is None:
            return Settings()
        raise NotFound(
            f"{chosen}: no such configuration file",
            remedy=f"create it, or leave out --config to use {default} or the built-in defaults",
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{chosen}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise _unreadable(chosen, error) from error
    return parse(text, chosen)


def parse(text: str, name: Path) -> Settings:
    """Return the settings that `text` holds; `name` is what complaints call it.

    Raises:
        InvalidArgument: See load().
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last = max(1, len(text.splitlines()))
        # tomllib gives no line for what is missing at the end, which is where people look last.
        words = str(error).replace("at end of document", f"at line {last}, the end of the file")
        raise InvalidArgument(f"{name}: not valid TOML: {words}", remedy="see https://toml.io") from None
    schema = inspect.type_info(Settings)
    assert isinstance(schema, inspect.StructType)
    for complaint in _unknown_keys(document, schema):
        raise _located(name, complaint)
    try:
        settings = msgspec.convert(document, Settings)
    except msgspec.ValidationError as error:
        raise _located(name, _bad_value(document, schema, str(error))) from None
    for complaint in problems(settings):
        raise _located(name, complaint)
    return settings


def keys() -> Iterator[tuple[str, object]]:
    """Iterate over every key the file may have, dotted, with its default."""
    schema = inspect.type_info(Settings)
    assert isinstance(schema, inspect.StructType)
    yield from _keys(schema, "")


def _keys(schema: inspect.StructType, prefix: str) -> Iterator[tuple[str, object]]:
    for field in schema.fields:
        if isinstance(field.type, inspect.StructType):
            yield from _keys(field.type, f"{prefix}{field.encode_name}.")
        elif field.default_factory is not msgspec.NODEFAULT:
            yield prefix + field.encode_name, field.default_factory()
        else:
            yield prefix + field.encode_name, field.default


def _unknown_keys(table: Mapping[str, Any], schema: inspect.StructType, prefix: str = "") -> Iterator[InvalidArgument]:
    fields = {field.encode_name: field.type for field in schema.fields}
    for key, value in table.items():
        known = fields.get(key)
        if known is None:
            yield InvalidArgument.field(prefix + key, value, "is not a known key", remedy=_closest(key, prefix))
        elif isinstance(known, inspect.StructType) and isinstance(value, Mapping):
            yield from _unknown_keys(value, known, f"{prefix}{key}.")


def _closest(key: str, prefix: str) -> str:
    """Say which key was probably meant: one of the same table, else of any, else list the table's."""
    every = [name for name, _ in keys()]
    siblings = {
        name.removeprefix(prefix).split(".")[0]: name for name in every if name.startswith(prefix) and name != prefix
    }
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    for name in every:
        if name.rsplit(".", 1)[-1] == key:
            return f"did you mean {name}?"
    far = difflib.get_close_matches(prefix + key, every, n=1)
    if far:
        return f"did you mean {far[0]}?"
    where = f"[{prefix.rstrip('.')}]" if prefix else "the top level"
    return f"{where} knows {', '.join(siblings)}"


def _bad_value(document: Mapping[str, Any], schema: inspect.StructType, words: str) -> InvalidArgument:
    """Turn msgspec's words into ours; they end with the place, such as "at `$.images.pinned[1]`"."""
    found = re.search(r" - at `\$\.([^`]+)`$", words)
    if found is None:
        return InvalidArgument(words)
    dotted = found.group(1)
    value: Any = document
    type_: inspect.Type = schema
    for step in re.findall(r"[^.\[\]]+", dotted):
        if isinstance(type_, inspect.StructType):
            value = value[step]
            type_ = next(field.type for field in type_.fields if field.encode_name == step)
        elif isinstance(type_, inspect.ListType):
            value = value[int(step)]
            type_ = type_.item_type
    return InvalidArgument.field(dotted, value, "cannot be used", remedy=f"give {_wanted(type_)}")


def _wanted(type_: inspect.Type) -> str:
    match type_:
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(f'"{value}"' for value in values)
        case inspect.IntType() | inspect.FloatType():
            name = "an integer" if isinstance(type_, inspect.IntType) else "a number"
            bounds = [(">", type_.gt), ("≥", type_.ge), ("<", type_.lt), ("≤", type_.le)]
            limits = [f"{sign} {bound:g}" for sign, bound in bounds if bound is not None]
            return f"{name} {' and '.join(limits)}".rstrip()
        case inspect.ListType(item_type=item):
            return f"an array, each item {_wanted(item)}"
        case inspect.StructType():
            return "a table"
        case inspect.StrType():
            return "a string"
        case inspect.BoolType():
            return "true or false"
        case _:
            return "another value"


def _located(name: Path, complaint: InvalidArgument) -> InvalidArgument:
    return InvalidArgument(f"{name}: {complaint.message}", remedy=complaint.remedy)


def _unreadable(path: Path, error: OSError) -> VmruntimeError:
    if isinstance(error, PermissionError):
        return PermissionDenied(f"{path}: permission denied", remedy="run as root")
    return InvalidArgument(f"{path}: cannot be read: {error.strerror}")
