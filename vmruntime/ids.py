"""Identifiers of sandboxes and containers."""

from __future__ import annotations

import secrets
from collections.abc import Callable

IdSource = Callable[[], str]


def new_id() -> str:
    """Return a fresh id: 64 lowercase hex digits, as every CRI runtime's ids are."""
    return secrets.token_hex(32)


def short_id(full: str) -> str:
    """Return the first 13 digits of an id, for people and for names with a length limit."""
    return full[:13]
