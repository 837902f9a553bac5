"""Plugin chains: what libcni does, by hand.

Source: the CNI specification 1.1.0, sections 3 (execution of network configurations) and 4 (plugin delegation).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vmruntime import tracing
from vmruntime.network.attachments import Attachment
from vmruntime.network.conf import NetworkConf
from vmruntime.network.errors import NetworkConfigError, NetworkError
from vmruntime.network.plugins import Plugins, answer
from vmruntime.network.result import CniResult, parse

WITH_CHECK = "0.4.0"
"""First version with CHECK, and whose DEL is given ADD's result: earlier plugins may refuse the key."""

WITH_GC_AND_STATUS = "1.1.0"

VALID_ATTACHMENTS = "cni.dev/valid-attachments"


class Cni:
    """Runs plugin chains."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins

    def missing(self, conf: NetworkConf) -> list[str]:
        """Return the plugins of a network that no directory has."""
        return self._plugins.find(conf.programs)[1]

    async def negotiated(self, conf: NetworkConf) -> NetworkConf:
        """Return a network with the newest version that its file offers and all of its programs speak.

        Raises:
            NetworkConfigError: There is none.
        """
        programs = conf.programs
        spoken = await asyncio.gather(*map(self._plugins.versions, programs))
        return choose_version(conf, dict(zip(programs, spoken, strict=True)))

    async def status(self, conf: NetworkConf) -> None:
        """Run STATUS, where the network's version has it: whether its plugins could make an attachment now.

        Raises:
            NetworkError: One says that it could not.
        """
        if conf.at_least(WITH_GC_AND_STATUS):
            for plugin in conf.plugins:
                request = _request(conf, plugin)
                await self._plugins.run(
                    plugin["type"], "STATUS", request, {}, where=conf.where, timeout=self._plugins.quick
                )

    async def collect(self, conf: NetworkConf, valid: Collection[Attachment]) -> bool:
        """Run GC, where the network's version has it: plugins release what belongs to no valid attachment.

        Args:
            conf: The network.
            valid: Every attachment to it, whether made completely or not.

        Returns:
            Whether it was run.

        Raises:
            NetworkError: At least one plugin failed; the message has them all.
        """
        if conf.disable_gc or not conf.at_least(WITH_GC_AND_STATUS):
            return False
        listed = [{"containerID": one.container_id, "ifname": one.ifname} for one in valid]
        failures: list[NetworkError] = []
        for plugin in conf.plugins:
            request = {**_request(conf, plugin), VALID_ATTACHMENTS: listed}
            try:
                await self._plugins.run(plugin["type"], "GC", request, {}, where=conf.where)
            except NetworkError as error:
                failures.append(error)
        _raise_all(failures)
        return True

    async def check(self, attachment: Attachment, lock: int) -> bool:
        """Run CHECK through the chain, where the network has it: whether an attachment is as ADD made it.

        Returns:
            Whether it was run.

        Raises:
            NetworkError: The first plugin that misses something.
        """
        conf = attachment.conf
        if conf.disable_check or attachment.result is None or not conf.at_least(WITH_CHECK):
            return False
        for plugin in conf.plugins:
            await self._run("CHECK", attachment, plugin, attachment.result, lock)
        return True

    async def add(self, attachment: Attachment, lock: int) -> CniResult:
        """Run ADD through the chain, each plugin seeing the result of the one before.

        Args:
            attachment: What is to be made.
            lock: See turn.py.

        Raises:
            NetworkError: A plugin failed; the caller is to run delete().
        """
        where = attachment.conf.where
        raw: dict[str, Any] | None = None
        for plugin in attachment.conf.plugins:
            printed = await self._run("ADD", attachment, plugin, raw, lock)
            raw = answer(printed, f"{where}: {plugin['type']} ADD")
        result = parse(raw, attachment.ifname, where)
        attachment.result = raw
        return result

    async def delete(self, attachment: Attachment, lock: int) -> None:
        """Run DEL through the chain in reverse; every plugin is run even if one fails.

        Args:
            attachment: As it was given to add().
            lock: See turn.py.

        Raises:
            NetworkError: At least one failed; the message has them all.
        """
        previous = attachment.result if attachment.conf.at_least(WITH_CHECK) else None
        failures: list[NetworkError] = []
        for plugin in reversed(attachment.conf.plugins):
            try:
                await self._run("DEL", attachment, plugin, previous, lock)
            except NetworkError as error:
                failures.append(error)
        _raise_all(failures)

    async def _run(
        self, command: str, attachment: Attachment, plugin: dict[str, Any], previous: dict[str, Any] | None, lock: int
    ) -> bytes:
        # A namespace that is gone is said to be gone: plugins then release only what they hold elsewhere.
        netns = attachment.netns if command != "DEL" or Path(attachment.netns).exists() else ""
        variables = {
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": netns,
            "CNI_IFNAME": attachment.ifname,
            "CNI_ARGS": attachment.args,
        }
        request = _request(attachment.conf, plugin, attachment.capabilities)
        if previous is not None:
            request["prevResult"] = previous
        where = attachment.conf.where
        with tracing.span(f"cni.{plugin['type']}", {"cni.command": command}):
            return await self._plugins.run(plugin["type"], command, request, variables, where=where, lock=lock)


def choose_version(conf: NetworkConf, spoken: Mapping[str, frozenset[str] | None]) -> NetworkConf:
    """Return a network with the newest version that its file offers and all of its programs speak.

    Args:
        conf: The network.
        spoken: The versions of each program; None: it does not say, and is taken at the file's word.

    Raises:
        NetworkConfigError: There is none.
    """
    for version in reversed(conf.offered):
        if all(versions is None or version in versions for versions in spoken.values()):
            return msgspec.structs.replace(conf, cni_version=version)
    limits = [
        f"{name} speaks {', '.join(sorted(versions)) or 'none'}"
        for name, versions in spoken.items()
        if versions is not None and not versions.issuperset(conf.offered)
    ]
    raise NetworkConfigError(
        f"{conf.source}: `cniVersion`: not all plugins speak {' or '.join(conf.offered)}: {'; '.join(limits)}",
        remedy="upgrade the plugins, or change cniVersion",
    )


def _request(
    conf: NetworkConf, plugin: Mapping[str, Any], capabilities: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a plugin's configuration with what the network and the runtime add (section 3, derivation)."""
    request = {**plugin, "name": conf.name, "cniVersion": conf.cni_version}
    # What is the runtime's to say is not taken from the file.
    for key in ("capabilities", "runtimeConfig", "prevResult", VALID_ATTACHMENTS):
        request.pop(key, None)
    wanted = plugin.get("capabilities") or {}
    arguments = {key: value for key, value in (capabilities or {}).items() if wanted.get(key)}
    if arguments:
        request["runtimeConfig"] = arguments
    return request


def _raise_all(failures: Sequence[NetworkError]) -> None:
    if failures:
        remedy = next((error.remedy for error in failures if error.remedy), "")
        raise NetworkError("; ".join(error.message for error in failures), remedy=remedy, code=failures[0].code)
