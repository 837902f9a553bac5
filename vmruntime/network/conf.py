"""CNI network configuration lists: found and checked, or the built-in one.

A file is kept as it was read, because plugins get their part of it unchanged; only the keys that vmruntime itself
uses are checked. Keys and versions follow the CNI specification 1.1.0, section 1.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vmruntime.network.errors import NetworkConfigError
from vmruntime.network.subnets import ranges, routes

SUPPORTED_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
SUFFIXES = (".conf", ".conflist", ".json")
SIZE_LIMIT = 1024 * 1024
BUILT_IN = "the built-in configuration"
DEFAULT_NAME = "vmruntime"
DEFAULT_BRIDGE = "vmrt0"
LOOPBACK = "loopback"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class NetworkConf(msgspec.Struct, frozen=True, kw_only=True):
    """One network: the plugins to run, in order.

    Attributes:
        name: Unique on the host; plugins keep their state under it.
        cni_version: One of SUPPORTED_VERSIONS, in which the plugins are spoken to.
        offered: Every version that the file offers and vmruntime speaks, oldest first.
        plugins: Each plugin's object as written in the file; "type" is a valid name.
        disable_check: CHECK must not be run.
        disable_gc: GC must not be run: other runtimes have pods on the network too.
        source: The file, or BUILT_IN.
    """

    name: str
    cni_version: str
    offered: list[str] = []
    plugins: list[dict[str, Any]]
    disable_check: bool = False
    disable_gc: bool = False
    source: str

    @property
    def where(self) -> str:
        """The network and its file, for messages."""
        return f"network {self.name} ({self.source})"

    @property
    def programs(self) -> list[str]:
        """Names of every program the network needs, IPAM plugins included, each once."""
        names: dict[str, None] = {}
        for plugin in self.plugins:
            names[plugin["type"]] = None
            ipam = plugin.get("ipam")
            if isinstance(ipam, dict) and ipam.get("type"):
                names[ipam["type"]] = None
        return list(names)

    @property
    def capabilities(self) -> set[str]:
        """The capabilities that at least one plugin has."""
        return {key for plugin in self.plugins for key, on in (plugin.get("capabilities") or {}).items() if on}

    def at_least(self, version: str) -> bool:
        """Whether the network speaks `version` of the protocol or a later one."""
        return SUPPORTED_VERSIONS.index(self.cni_version) >= SUPPORTED_VERSIONS.index(version)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a configuration directory holds.

    Attributes:
        conf: The network to use.
        skipped: Why each file before it by name cannot be used.
    """

    conf: NetworkConf
    skipped: tuple[str, ...] = ()


class _Plugin(msgspec.Struct):
    type: str
    capabilities: dict[str, bool] | None = None


class _List(msgspec.Struct):
    name: str
    plugins: list[_Plugin]
    cniVersion: str = ""
    cniVersions: list[str] | None = None
    disableCheck: bool | str = False
    disableGC: bool | str = False
    loadOnlyInlinedPlugins: bool | str = False


def find(conf_dir: Path, default_subnet: str, *, but: str = "") -> Found:
    """Return the first usable network of a directory by file name, or the built-in one when it holds no files.

    Args:
        conf_dir: The directory.
        default_subnet: Of the built-in network.
        but: Name of a file to pass over.

    Files that cannot be used do not make way for the built-in network: pods would quietly land in the wrong one.

    Raises:
        NetworkConfigError: No file can be used; the message has the reason for each.
    """
    paths = [path for path in _files(conf_dir) if path.name != but]
    if not paths:
        return Found(default(default_subnet))
    skipped: list[str] = []
    for path in paths:
        try:
            return Found(read(path), tuple(skipped))
        except NetworkConfigError as error:
            skipped.append(str(error))
    raise NetworkConfigError("no usable CNI configuration: " + "; ".join(skipped), remedy="correct or remove the files")


def read(path: Path) -> NetworkConf:
    """Read one file: a list of plugins, or a single plugin.

    Plugins that lie in files of their own, in a directory beside the file that is named like the network, come after
    the list's (specification 1.1.0, loadOnlyInlinedPlugins).

    Raises:
        NetworkConfigError: Unreadable, not JSON, or a key has the wrong form.
    """
    raw = _json(path)
    if isinstance(raw, dict) and "type" not in raw and _NAME.fullmatch(str(raw.get("name", ""))):
        only = raw.get("loadOnlyInlinedPlugins", False)
        if not (isinstance(only, bool | str) and _flag("loadOnlyInlinedPlugins", only, str(path))):
            more = [_json(file) for file in _files(path.parent / raw["name"], (".conf",))]
            inlined = raw.get("plugins", [])
            if more and isinstance(inlined, list):
                raw = {**raw, "plugins": [*inlined, *more]}
    return parse(raw, str(path))


def parse(raw: object, source: str) -> NetworkConf:
    """Check a decoded configuration; `source` is named in errors.

    Raises:
        NetworkConfigError: A key has the wrong form.
    """
    if not isinstance(raw, dict):
        raise NetworkConfigError(f"{source}: expected an object, found {type(raw).__name__}")
    if "plugins" not in raw:
        if "type" not in raw:
            raise NetworkConfigError(f"{source}: has neither `plugins` nor `type`")
        shared = {key: raw[key] for key in ("name", "cniVersion", "cniVersions") if key in raw}
        raw = {**shared, "plugins": [raw]}
    known = _known(raw, source)
    if not _NAME.fullmatch(known.name):
        raise NetworkConfigError(
            f"{source}: `name`: {known.name[:80]!r} is not a network name",
            remedy="begin with a letter or digit; letters, digits, _ . and - may follow",
        )
    if not known.plugins:
        raise NetworkConfigError(f"{source}: `plugins` is empty")
    for number, plugin in enumerate(raw["plugins"]):
        _check_programs(plugin, f"{source}: `plugins[{number}]")
    if all(plugin.type == LOOPBACK for plugin in known.plugins):
        raise NetworkConfigError(f"{source}: the loopback plugin alone gives pods no address", remedy="remove the file")
    offered = _versions(known, source)
    return NetworkConf(
        name=known.name,
        cni_version=offered[-1],
        offered=offered,
        plugins=list(raw["plugins"]),
        disable_check=_flag("disableCheck", known.disableCheck, source),
        disable_gc=_flag("disableGC", known.disableGC, source),
        source=source,
    )


def default(subnet: str) -> NetworkConf:
    """Build the built-in network: a bridge with addresses from `subnet`, host ports and masquerading.

    Raises:
        NetworkConfigError: `subnet` is not a network in CIDR form with room for pods, or several with commas.
    """
    try:
        subnets = [ipaddress.ip_network(part.strip()) for part in subnet.split(",")]
    except ValueError as error:
        raise NetworkConfigError(f"network.default_subnet: {error}") from error
    if min(one.num_addresses for one in subnets) < 8:
        raise NetworkConfigError(f"network.default_subnet: {subnet} has no room for pods", remedy="use a /16 to /24")
    bridge = {
        "type": "bridge",
        "bridge": DEFAULT_BRIDGE,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": ranges(subnets), "routes": routes(subnets)},
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return NetworkConf(
        name=DEFAULT_NAME,
        cni_version="1.1.0",
        offered=["0.4.0", "1.0.0", "1.1.0"],
        plugins=[bridge, portmap],
        source=BUILT_IN,
    )


def valid_plugin_name(name: object) -> bool:
    """Whether a plugin's "type" can be a file name and nothing else: it is joined to a directory and run."""
    return isinstance(name, str) and len(name) <= 255 and _NAME.fullmatch(name) is not None


def _files(directory: Path, suffixes: Sequence[str] = SUFFIXES) -> Iterator[Path]:
    """Iterate over a directory's configuration files by name; a missing directory has none.

    Raises:
        NetworkConfigError: The directory cannot be read.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix in suffixes)
        # What is neither a file nor nothing would not end when it is read: a pipe, a device.
        yield from (path for path in paths if path.is_file() or not path.exists())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise NetworkConfigError(f"{directory}: {error.strerror}") from error


def _json(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise NetworkConfigError(f"{path}: {error.strerror}") from error
    if len(data) > SIZE_LIMIT:
        raise NetworkConfigError(f"{path}: larger than {SIZE_LIMIT} bytes")
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NetworkConfigError(f"{path}: not JSON: {error}") from error


def _known(raw: dict[str, Any], source: str) -> _List:
    try:
        return msgspec.convert(raw, _List)
    except (msgspec.ValidationError, RecursionError) as error:
        # msgspec ends its message with the place, such as "at `$.plugins[0].type`".
        text, _, place = str(error).partition(" - at `$.")
        raise NetworkConfigError(
            f"{source}: `{place.rstrip('`')}`: {text}" if place else f"{source}: {text}"
        ) from error


def _check_programs(plugin: dict[str, Any], where: str) -> None:
    """Check the names of the programs that a plugin's object stands for; `where` ends with an open quotation."""
    if not valid_plugin_name(plugin["type"]):
        raise NetworkConfigError(f"{where}.type`: {plugin['type'][:80]!r} is not a plugin name")
    ipam = plugin.get("ipam")
    kind = ipam.get("type") if isinstance(ipam, dict) else None
    if kind and not valid_plugin_name(kind):
        raise NetworkConfigError(f"{where}.ipam.type`: {str(kind)[:80]!r} is not a plugin name")


def _versions(known: _List, source: str) -> list[str]:
    """Return the versions that the file offers and vmruntime speaks, oldest first; at least one."""
    offered = [version for version in (*(known.cniVersions or []), known.cniVersion) if version]
    if not offered:
        raise NetworkConfigError(f"{source}: `cniVersion` is missing", remedy='add "cniVersion": "1.0.0"')
    usable = [version for version in SUPPORTED_VERSIONS if version in offered]
    if not usable:
        raise NetworkConfigError(
            f"{source}: `cniVersion`: {', '.join(offered)[:80]} is not supported",
            remedy=f"one of {', '.join(SUPPORTED_VERSIONS)}",
        )
    return usable


def _flag(key: str, value: bool | str, source: str) -> bool:
    """Read a flag; the specification allowed the string form once."""
    if isinstance(value, bool):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise NetworkConfigError(f"{source}: `{key}`: {value[:80]!r} is neither true nor false")
