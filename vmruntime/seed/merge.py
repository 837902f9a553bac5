"""How Virtlet joins two pieces of user-data."""

from __future__ import annotations

from typing import Any


def merge(base: Any, override: Any) -> Any:
    """Return two values joined: mappings by key, lists one behind the other, of everything else the second.

    Neither argument is changed.
    """
    if isinstance(base, dict) and isinstance(override, dict):
        joined = {key: merge(base[key], value) if key in base else value for key, value in override.items()}
        return {**base, **joined}
    if isinstance(base, list) and isinstance(override, list):
        return [*base, *override]
    return override
