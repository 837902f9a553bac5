"""What names without a registry mean: the aliases of containers-registries.conf(5), else docker.io.

skopeo reads the same files for mirrors and blocked registries, but leaves short names to its callers. Searching several
registries (unqualified-search-registries) is left out: whoever registers a name first on one of them would own it.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.images import reference as references
from vmruntime.images.reference import Reference

HOST_CONF = Path("/etc/containers/registries.conf")
DROP_INS = Path("/etc/containers/registries.conf.d")
"""Read after the main file, by name, whichever that is (containers-registries.conf.d(5))."""

_MANUAL = "see containers-registries.conf(5)"


class ShortNames:
    """Makes names full. `refresh` reads the files; until then there are no aliases."""

    def __init__(self, conf: str, drop_ins: Path = DROP_INS) -> None:
        """Read nothing yet.

        Args:
            conf: images.registries_conf; empty: the host's.
            drop_ins: Directory of further files.
        """
        self._conf = Path(conf) if conf else HOST_CONF
        self._drop_ins = drop_ins
        self._aliases: Mapping[str, Reference] = {}

    async def refresh(self) -> None:
        """Read the files again, as skopeo does for every pull.

        Raises:
            FailedPrecondition: One cannot be read or has an alias that is none; the aliases stay as they were.
        """
        self._aliases = await in_thread(lambda: read_aliases(self._conf, self._drop_ins))

    def resolve(self, text: str) -> Reference:
        """Return what a name as people write it means.

        Raises:
            InvalidArgument: See reference.parse().
        """
        plain = references.parse(text)
        alias = self._aliases.get(references.short_name(text) or "")
        return plain if alias is None else dataclasses.replace(plain, domain=alias.domain, path=alias.path)


def read_aliases(conf: Path, drop_ins: Path) -> dict[str, Reference]:
    """Return what short names stand for; a later file overrides an earlier one, an empty value removes an alias.

    Raises:
        FailedPrecondition: A file cannot be read or is not TOML, or an alias is none.
    """
    found: dict[str, Reference] = {}
    for path in (conf, *sorted(drop_ins.glob("*.conf"))):
        for name, value in _table(path).items():
            if value == "":
                found.pop(name, None)
            else:
                found[name] = _target(path, name, value)
    return found


def _table(path: Path) -> Mapping[str, Any]:
    try:
        aliases = tomllib.loads(path.read_text(encoding="utf-8")).get("aliases", {})
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FailedPrecondition(f"{path}: cannot be read: {error}", remedy=_MANUAL) from error
    if not isinstance(aliases, dict):
        raise FailedPrecondition(f"{path}: aliases: {aliases!r} is not a table", remedy=_MANUAL)
    return aliases


def _target(path: Path, name: str, value: Any) -> Reference:
    """Return the repository that an alias leads to; both sides come without tag and digest."""
    bare = references.short_name(name) == name
    full = isinstance(value, str) and not references.short_name(value) and not set(":@") & set(value.rpartition("/")[2])
    try:
        target = references.parse(value) if full else None
    except InvalidArgument:
        target = None
    if not bare or target is None:
        raise FailedPrecondition(
            f"{path}: aliases: {name!r} = {value!r} does not lead from a name without registry and tag to one with"
            " a registry and without tag",
            remedy=_MANUAL,
        )
    return target
