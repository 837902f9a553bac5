"""The one connection to a machine's QEMU guest agent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from vmruntime.agent.errors import AgentError, AgentGone, AgentLied
from vmruntime.errors import InvalidArgument
from vmruntime.qga.channel import Channel
from vmruntime.qga.client import GuestAgent
from vmruntime.qga.errors import QgaError, QgaGone, QgaLied

ANSWER_SECONDS = 5.0
"""How long an agent may take to say that it is there; one in a guest that still boots says nothing."""


class GuestLink:
    """Makes the connection when it is needed, and again after it broke; DIRECTORY/qga.sock serves one client at a time."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "qga.sock"
        self._turn = asyncio.Lock()
        self._agent: GuestAgent | None = None

    async def agent(self) -> GuestAgent:
        """Return an agent that answers now.

        Raises:
            QgaSilent: It does not: the guest still boots, or has none.
            QgaGone: The machine does not run.
            QgaLied: It breaks the protocol.
        """
        for last in (False, True):
            agent = await self._connected()
            try:
                await agent.ping(ANSWER_SECONDS)
            except QgaGone:
                # Of an earlier run of the machine, which shows only now.
                if last:
                    raise
            else:
                return agent
        raise QgaGone

    async def close(self) -> None:
        """Let go of the connection; a later agent() makes another."""
        async with self._turn:
            if self._agent is not None:
                await self._agent.close()
                self._agent = None

    async def _connected(self) -> GuestAgent:
        async with self._turn:
            if self._agent is not None and self._agent.closed:
                await self._agent.close()
                self._agent = None
            if self._agent is None:
                self._agent = GuestAgent(await Channel.connect(self._path))
            return self._agent


@contextlib.contextmanager
def told_as_agent_errors() -> Iterator[None]:
    """Raise what a guest agent does wrong as agent.interface.Agent says."""
    try:
        yield
    except QgaGone as error:
        raise AgentGone("the pod's machine does not run, or somebody closed its channel to the guest agent") from error
    except QgaLied as error:
        raise AgentLied(error.message) from error
    except (QgaError, InvalidArgument) as error:
        raise AgentError(str(error), error.code) from error
