"""Images that nobody's clean-up may take: names, and patterns of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from vmruntime.images.reference import Reference

WILDCARD = "*"


class Pins:
    """What images.pinned says.

    An entry without a wildcard is a name as people write it; in one with wildcards each "*" stands for any characters,
    slashes as well, and it has to cover a full name: `registry.example/infra/*`, `*/pause:*`.
    """

    def __init__(self, entries: Iterable[str], resolve: Callable[[str], Reference]) -> None:
        """Take the entries.

        Args:
            entries: Of images.pinned.
            resolve: Makes names full.

        Raises:
            InvalidArgument: An entry without a wildcard is no reference.
        """
        listed = list(entries)
        self._resolve = resolve
        self._names = [entry for entry in listed if WILDCARD not in entry]
        for name in self._names:
            resolve(name)
        self._patterns = [
            re.compile(".*".join(re.escape(part) for part in entry.split(WILDCARD)))
            for entry in listed
            if WILDCARD in entry
        ]

    def cover(self, names: Iterable[str]) -> bool:
        """Whether any of an image's full names is pinned."""
        listed = list(names)
        # Made full each time: what a short name means may change while the daemon runs.
        pinned = {str(self._resolve(name)) for name in self._names}
        return any(name in pinned or any(p.fullmatch(name) for p in self._patterns) for name in listed)
