"""What a server said of the files that came from it, so that one that has not changed is not fetched again."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from vmruntime.images.http_head import Head

_SUFFIX = ".seen"


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """A file as it was fetched.

    Attributes:
        digest: "sha256:…" of its content.
        validator: Its entity tag, or when it was changed.
        total: Its bytes.
    """

    digest: str
    validator: str
    total: int

    def still(self, head: Head | None) -> bool:
        """Whether a server now says the same of it."""
        return head is not None and head.status == 200 and (head.validator, head.total) == (self.validator, self.total)


class Seen:
    """A directory with a small file for each place. Everything blocks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, place: str) -> Sight | None:
        """Return what is known of a place."""
        return _read(self._path(place))

    def put(self, place: str, digest: str, head: Head | None) -> None:
        """Note what was fetched from a place; a server that says nothing to tell it by: nothing."""
        path = self._path(place)
        if head is None or not head.validator or head.total is None:
            path.unlink(missing_ok=True)
            return
        new = path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(Sight(digest=digest, validator=head.validator, total=head.total)))
        new.replace(path)

    def sweep(self, known: Callable[[str], bool]) -> None:
        """Forget all that is of digests which are not known."""
        for path in self._directory.glob(f"*{_SUFFIX}"):
            sight = _read(path)
            if sight is None or not known(sight.digest):
                path.unlink(missing_ok=True)

    def _path(self, place: str) -> Path:
        # By a digest, because places may have passwords.
        return self._directory / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}{_SUFFIX}"


def _read(path: Path) -> Sight | None:
    with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=Sight)
    return None
