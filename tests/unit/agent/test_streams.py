"""Conversations with an agent, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from vmruntime.agent.calls import open_channel
from vmruntime.agent.streams import ExecStream
from vmruntime.generated import agent_pb2
from vmruntime.model.streams import TerminalSize

SERVICE = "test.Listener"
ROUNDS = 100


async def test_what_two_tasks_send_at_once_all_arrives(tmp_path: Path) -> None:
    """gRPC takes one write at a time; a size must not be lost because input is on its way, nor the reverse."""
    heard: list[str] = []

    async def listen(requests: AsyncIterator[Any], _context: object) -> AsyncIterator[Any]:
        async for request in requests:
            heard.append(request.WhichOneof("message"))
            if heard[-1] == "stdin_closed":
                break
        yield agent_pb2.ExecResponse(exited=agent_pb2.ExecExited(exit_code=3))

    handler = grpc.stream_stream_rpc_method_handler(
        listen, agent_pb2.ExecRequest.FromString, agent_pb2.ExecResponse.SerializeToString
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Exec": handler})])
    server.add_insecure_port(f"unix:{tmp_path / 'socket'}")
    await server.start()
    try:
        async with open_channel(tmp_path / "socket") as channel:
            call = channel.stream_stream(
                f"/{SERVICE}/Exec", agent_pb2.ExecRequest.SerializeToString, agent_pb2.ExecResponse.FromString
            )
            stream = ExecStream(call())

            async def resize() -> None:
                for columns in range(1, ROUNDS + 1):
                    await stream.resize(TerminalSize(columns=columns, rows=1))

            async def write() -> None:
                for _ in range(ROUNDS):
                    await stream.write(b"x" * 1000)

            await asyncio.gather(resize(), write())
            await stream.close_input()
            async for _ in stream.output():
                pass
            assert stream.end.exit_code == 3
    finally:
        await server.stop(None)
    assert (heard.count("resize"), heard.count("stdin"), heard[-1]) == (ROUNDS, ROUNDS, "stdin_closed")
