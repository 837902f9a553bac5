"""A guest agent at the other end of a socket pair: honest by default, and whatever a test makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

from vmruntime.qga.channel import Channel
from vmruntime.qga.client import GuestAgent

COMMANDS = (
    "guest-sync-delimited", "guest-ping", "guest-info", "guest-exec", "guest-exec-status", "guest-shutdown",
    "guest-network-get-interfaces", "guest-get-fsinfo",
)  # fmt: skip

Answer = Any
"""JSON of a result; an Exception: an error with its text; bytes: sent as they are; None: nothing is sent."""

NOTHING = object()


class FakeAgent:
    """Answers commands by `answers`, each a value or a function of the arguments, which may be a coroutine.

    Attributes:
        calls: (command, arguments) in order, without guest-sync-delimited.
        deaf: While set, nothing is read.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.syncs = 0
        self.listening = asyncio.Event()
        self.listening.set()
        self.answers: dict[str, Any] = {
            "guest-ping": {},
            "guest-info": {
                "version": "7.2.0",
                "supported_commands": [{"name": name, "enabled": True} for name in COMMANDS],
            },
            "guest-shutdown": NOTHING,
        }

    async def serve(self) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                await self.listening.wait()
                # As qemu-ga's parser: the byte ends what was half read before it.
                await self._obey(json.loads(line.rsplit(b"\xff", 1)[-1]))

    async def _obey(self, document: dict[str, Any]) -> None:
        command, arguments = document["execute"], document.get("arguments", {})
        if command == "guest-sync-delimited":
            self.syncs += 1
            sync = self.answers.get(command, arguments["id"])
            await self._send(
                sync if isinstance(sync, bytes) else b"\xff" + json.dumps({"return": sync}).encode() + b"\n"
            )
            return
        self.calls.append((command, arguments))
        answer = self.answers.get(command, KeyError(f"The command {command} has not been found"))
        if callable(answer):
            answer = answer(arguments)
            if asyncio.iscoroutine(answer):
                answer = await answer
        if isinstance(answer, KeyError):
            await self._send_json({"error": {"class": "CommandNotFound", "desc": answer.args[0]}})
        elif isinstance(answer, Exception):
            await self._send_json({"error": {"class": "GenericError", "desc": str(answer)}})
        elif isinstance(answer, bytes):
            await self._send(answer)
        elif answer is not NOTHING:
            await self._send_json({"return": answer})

    async def _send_json(self, document: object) -> None:
        await self._send(json.dumps(document).encode() + b"\n")

    async def _send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[GuestAgent, FakeAgent]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    fake = FakeAgent(*await asyncio.open_connection(sock=theirs))
    agent = GuestAgent(Channel(*await asyncio.open_connection(sock=ours)))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(fake.serve())
        try:
            yield agent, fake
        finally:
            task.cancel()
            await agent.close()
            fake.writer.transport.abort()
