from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import pytest

from tests.unit.streaming.fakes import FakePods
from vmruntime.config.settings import StreamingSettings
from vmruntime.streaming.server import StreamingServer


@dataclasses.dataclass
class Rig:
    server: StreamingServer
    pods: FakePods


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """A server on a real socket, with time-outs short enough to wait for."""
    pods = FakePods()
    server = StreamingServer(pods, StreamingSettings(), creation_timeout=0.3, idle_timeout=30.0)  # type: ignore[arg-type]
    await server.start()
    yield Rig(server, pods)
    await server.stop()
