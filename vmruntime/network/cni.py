"""libcni's protocol by hand: a plugin is a program, its request is JSON on stdin and CNI_* in the environment.

Source: the CNI specification 1.0.0, sections 2 (execution protocol) and 4 (plugin chains).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from vmruntime.aio.process import Completed, last_lines, run
from vmruntime.network.conf import NetworkConf, find_programs
from vmruntime.network.errors import NetworkError
from vmruntime.network.result import CniResult, parse


class Attachment(msgspec.Struct, kw_only=True):
    """One pod's attachment to a network: everything DEL needs, whatever has changed since ADD.

    Attributes:
        netns: Path of the pod's network namespace.
        args: CNI_ARGS as key=value;….
        capabilities: Capability arguments by name, such as portMappings.
        result: What ADD answered; None until it did.
    """

    container_id: str
    netns: str
    ifname: str
    conf: NetworkConf
    args: str
    capabilities: dict[str, Any]
    result: dict[str, Any] | None = None


class Cni:
    """Runs plugin chains."""

    def __init__(self, bin_dirs: list[str], timeout: float) -> None:
        self._bin_dirs = bin_dirs
        self._timeout = timeout

    def missing(self, conf: NetworkConf) -> list[str]:
        """Return the plugins of a network that no directory has."""
        return find_programs(conf.programs, self._bin_dirs)[1]

    async def add(self, attachment: Attachment, lock: int) -> CniResult:
        """Run ADD through the chain, each plugin seeing the result of the one before.

        Args:
            attachment: What is to be made.
            lock: See turn.py.

        Raises:
            NetworkError: A plugin failed; the caller is to run delete().
        """
        raw: dict[str, Any] | None = None
        for plugin in attachment.conf.plugins:
            done = await self._invoke("ADD", attachment, plugin, raw, lock)
            raw = _object(done, attachment, plugin)
        attachment.result = raw
        return parse(raw, attachment.ifname, f"network {attachment.conf.name} ({attachment.conf.source})")

    async def delete(self, attachment: Attachment, lock: int) -> None:
        """Run DEL through the chain in reverse; every plugin is run even if one fails.

        Args:
            attachment: As it was given to add().
            lock: See turn.py.

        Raises:
            NetworkError: At least one failed; the message has them all.
        """
        failures = []
        for plugin in reversed(attachment.conf.plugins):
            try:
                await self._invoke("DEL", attachment, plugin, attachment.result, lock)
            except NetworkError as error:
                failures.append(error.message)
        if failures:
            raise NetworkError("; ".join(failures))

    async def _invoke(
        self, command: str, attachment: Attachment, plugin: dict[str, Any], previous: dict[str, Any] | None, lock: int
    ) -> Completed:
        name = plugin["type"]
        programs, _ = find_programs([name], self._bin_dirs)
        if name not in programs:
            raise NetworkError(
                f"network {attachment.conf.name}: the plugin {name!r} is in none of {', '.join(self._bin_dirs)}",
                remedy="install containernetworking-plugins, or set network.bin_dirs",
            )
        # A namespace that is gone is said to be gone: plugins then release only what they hold elsewhere.
        netns = attachment.netns if command != "DEL" or Path(attachment.netns).exists() else ""
        env = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": netns,
            "CNI_IFNAME": attachment.ifname,
            "CNI_ARGS": attachment.args,
            "CNI_PATH": ":".join(self._bin_dirs),
        }
        request = msgspec.json.encode(_request(attachment, plugin, previous))
        done = await run([str(programs[name])], input=request, env=env, timeout=self._timeout, pass_fds=(lock,))
        if done.returncode != 0:
            raise _failure(command, attachment, name, done)
        return done


def _request(attachment: Attachment, plugin: dict[str, Any], previous: dict[str, Any] | None) -> dict[str, Any]:
    """Return a plugin's configuration with what the chain and the runtime add (specification, section 3)."""
    request = {**plugin, "name": attachment.conf.name, "cniVersion": attachment.conf.cni_version}
    wanted = request.pop("capabilities", {})
    arguments = {key: value for key, value in attachment.capabilities.items() if wanted.get(key)}
    if arguments:
        request["runtimeConfig"] = arguments
    if previous is not None:
        request["prevResult"] = previous
    return request


def _object(done: Completed, attachment: Attachment, plugin: dict[str, Any]) -> dict[str, Any]:
    where = f"network {attachment.conf.name}: the plugin {plugin['type']!r}"
    try:
        answer = msgspec.json.decode(done.stdout)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NetworkError(f"{where} answered no JSON: {error}") from error
    if not isinstance(answer, dict):
        raise NetworkError(f"{where} answered no JSON object")
    return answer


def _failure(command: str, attachment: Attachment, name: str, done: Completed) -> NetworkError:
    """Return the plugin's own error, or what it said instead of one (specification, section 5, Error)."""
    where = f"network {attachment.conf.name} ({attachment.conf.source}): {name} {command} failed"
    try:
        error = msgspec.json.decode(done.stdout)
        code, text = int(error.get("code", 0)), f"{error.get('msg', '')} {error.get('details', '')}".strip()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, AttributeError, TypeError, ValueError):
        code, text = 0, last_lines(done.stderr) or f"status {done.returncode}"
    return NetworkError(f"{where}: {text[:1000]}", cni_code=code)
