from __future__ import annotations

import asyncio
import os
import socket as sockets
import stat
from pathlib import Path

import grpc
import pytest

from tests.unit.cri.conftest import Rig, make_server
from vmruntime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unavailable
from vmruntime.generated import cri_pb2 as cri


async def test_only_the_owner_may_connect_and_nothing_is_left_beside_the_socket(rig: Rig) -> None:
    mode = rig.socket.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert os.listdir(rig.socket.parent) == [rig.socket.name]


async def test_makes_a_private_directory(socket_dir: Path) -> None:
    server = make_server(socket_dir / "run" / "cri.sock")
    async with server:
        assert stat.S_IMODE((socket_dir / "run").stat().st_mode) == 0o700


async def test_refuses_to_take_over_a_live_socket(rig: Rig) -> None:
    with pytest.raises(AlreadyExists, match="another daemon answers"):
        await make_server(rig.socket).start()
    assert (await rig.runtime.Version(cri.VersionRequest())).runtime_name == "vmruntime"


async def test_replaces_a_stale_socket(socket_dir: Path) -> None:
    path = socket_dir / "cri.sock"
    with sockets.socket(sockets.AF_UNIX) as stale:
        stale.bind(str(path))
    async with make_server(path):
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            await asyncio.wait_for(channel.channel_ready(), 5)
    assert not path.exists()


async def test_refuses_what_is_not_a_socket(socket_dir: Path) -> None:
    path = socket_dir / "cri.sock"
    path.write_text("precious")
    with pytest.raises(FailedPrecondition, match="not a socket"):
        await make_server(path).start()
    assert path.read_text() == "precious"


async def test_refuses_a_path_too_long_for_a_socket(socket_dir: Path) -> None:
    with pytest.raises(InvalidArgument, match="107 bytes"):
        await make_server(socket_dir / ("x" * 100)).start()


async def test_a_directory_that_cannot_be_made(socket_dir: Path) -> None:
    (socket_dir / "file").write_text("")
    with pytest.raises(Unavailable):
        await make_server(socket_dir / "file" / "cri.sock").start()


async def test_stop_removes_the_socket_and_may_be_repeated(socket_dir: Path) -> None:
    server = make_server(socket_dir / "cri.sock")
    await server.start()
    await server.stop()
    await server.stop()
    assert not server_paths(socket_dir)


async def test_stop_leaves_the_socket_of_a_successor(socket_dir: Path) -> None:
    path = socket_dir / "cri.sock"
    server = make_server(path)
    await server.start()
    path.unlink()
    path.write_text("the successor's")
    await server.stop()
    assert path.exists()


async def test_stop_ends_event_streams_at_once(rig: Rig) -> None:
    call = rig.runtime.GetContainerEvents(cri.GetEventsRequest())
    reading = asyncio.ensure_future(call.read())
    await asyncio.wait_for(rig.pods.listening.wait(), 5)
    await asyncio.wait_for(rig.server.stop(grace=30), 5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reading
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert rig.pods.listeners == 0


async def test_a_call_under_way_may_end(rig: Rig) -> None:
    gate = asyncio.Event()

    async def slow() -> tuple[bool, str, str]:
        gate.set()
        await asyncio.sleep(0.1)
        return True, "", ""

    rig.conditions.runtime_ready = slow  # type: ignore[method-assign]
    call = asyncio.ensure_future(rig.runtime.Status(cri.StatusRequest()))
    await gate.wait()
    await rig.server.stop(grace=5)
    assert (await call).status.conditions[0].status


def server_paths(directory: Path) -> list[str]:
    return os.listdir(directory)
