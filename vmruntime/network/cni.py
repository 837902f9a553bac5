"""Plugin chains: what libcni does, by hand.

Source: the CNI specification 1.1.0, sections 3 (execution of network configurations) and 4 (plugin delegation).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmruntime.network.attachments import Attachment
from vmruntime.network.conf import NetworkConf
from vmruntime.network.errors import NetworkError
from vmruntime.network.plugins import Plugins, answer
from vmruntime.network.result import CniResult, parse

RESULT_ON_DELETE = "0.4.0"
"""First version whose DEL is given ADD's result; earlier plugins may refuse the key."""


class Cni:
    """Runs plugin chains."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins

    def missing(self, conf: NetworkConf) -> list[str]:
        """Return the plugins of a network that no directory has."""
        return self._plugins.find(conf.programs)[1]

    async def add(self, attachment: Attachment, lock: int) -> CniResult:
        """Run ADD through the chain, each plugin seeing the result of the one before.

        Args:
            attachment: What is to be made.
            lock: See turn.py.

        Raises:
            NetworkError: A plugin failed; the caller is to run delete().
        """
        where = _where(attachment.conf)
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
        previous = attachment.result if attachment.conf.at_least(RESULT_ON_DELETE) else None
        failures: list[NetworkError] = []
        for plugin in reversed(attachment.conf.plugins):
            try:
                await self._run("DEL", attachment, plugin, previous, lock)
            except NetworkError as error:
                failures.append(error)
        if failures:
            remedy = next((error.remedy for error in failures if error.remedy), "")
            raise NetworkError("; ".join(error.message for error in failures), remedy=remedy, code=failures[0].code)

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
        request = _request(attachment, plugin, previous)
        where = _where(attachment.conf)
        return await self._plugins.run(plugin["type"], command, request, variables, where=where, lock=lock)


def _where(conf: NetworkConf) -> str:
    return f"network {conf.name} ({conf.source})"


def _request(attachment: Attachment, plugin: dict[str, Any], previous: dict[str, Any] | None) -> dict[str, Any]:
    """Return a plugin's configuration with what the chain and the runtime add (section 3, derivation)."""
    request = {**plugin, "name": attachment.conf.name, "cniVersion": attachment.conf.cni_version}
    # What is the runtime's to say is not taken from the file.
    for key in ("capabilities", "runtimeConfig", "prevResult"):
        request.pop(key, None)
    wanted = plugin.get("capabilities") or {}
    arguments = {key: value for key, value in attachment.capabilities.items() if wanted.get(key)}
    if arguments:
        request["runtimeConfig"] = arguments
    if previous is not None:
        request["prevResult"] = previous
    return request
