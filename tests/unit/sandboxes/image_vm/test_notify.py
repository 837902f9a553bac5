"""What systemd in a machine tells, and what a machine may try."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vmruntime.aio.detached import ProcessIdentity
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.interface import VmHandle
from vmruntime.sandboxes.image_vm import notify
from vmruntime.sandboxes.image_vm.notify import BootNotices, notify_credential

CID = 4097


class Heard:
    def __init__(self, directory: Path) -> None:
        self.path = directory / f"vsock.sock_{CID}"
        self.got: list[dict[str, str]] = []
        self._news = asyncio.Event()

    def notice(self, fields: dict[str, str]) -> None:
        self.got.append(fields)
        self._news.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.got) < count:
                self._news.clear()
                await self._news.wait()

    async def say(self, message: bytes) -> None:
        """As systemd does: say it, say that this is all, and wait until the other side hangs up."""
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        with contextlib.suppress(OSError):
            writer.write(message)
            await writer.drain()
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def handle(directory: Path, *, native: bool = False) -> VmHandle:
    return VmHandle(
        id="0123456789abcdef",
        driver="fake",
        process=ProcessIdentity(pid=1, start_time=1),
        helpers=[],
        directory=str(directory),
        cid=CID,
        vsock="" if native else str(directory / "vsock.sock"),
    )


@pytest.fixture
async def heard(tmp_path: Path) -> AsyncIterator[Heard]:
    found = Heard(tmp_path)
    notices = BootNotices(handle(tmp_path), found.notice)
    await notices.open()
    yield found
    await notices.close()
    assert not found.path.exists()


def test_the_credential() -> None:
    assert notify_credential(CID) == "io.systemd.credential:vmm.notify_socket=vsock-stream:2:4097"


async def test_each_message_is_told(heard: Heard) -> None:
    await heard.say(b"X_SYSTEMD_HOSTNAME=vm\n")
    await heard.say(b"READY=1\nSTATUS=Startup finished in 9s (kernel) + 1s = 10s.")
    await heard.until(2)
    assert heard.got == [
        {"X_SYSTEMD_HOSTNAME": "vm"},
        {"READY": "1", "STATUS": "Startup finished in 9s (kernel) + 1s = 10s."},
    ]


async def test_a_transport_that_does_not_pass_on_the_end(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "QUIET_SECONDS", 0.1)
    reader, writer = await asyncio.open_unix_connection(str(heard.path))
    writer.write(b"READY=1")
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    await writer.wait_closed()
    await heard.until(1)
    assert heard.got == [{"READY": "1"}]


async def test_what_a_machine_may_try(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "QUIET_SECONDS", 0.2)
    await heard.say(b"")
    await heard.say(b"\0\xff\nno field\n=x\nA B=1\n" + b"N" * 65 + b"=1")
    await heard.say(b"STATUS=" + b"x" * notify.MESSAGE_LIMIT)
    await heard.say(b"STATUS=\x1b[31m" + b"y" * 1000)
    with contextlib.ExitStack() as silent:
        for _ in range(3 * notify.CONNECTIONS // 2):
            one = silent.enter_context(socket.socket(socket.AF_UNIX))
            await asyncio.to_thread(one.connect, str(heard.path))
        await heard.say(b"READY=1")
    await heard.until(2)
    assert heard.got[1] == {"READY": "1"}
    assert list(heard.got[0]) == ["STATUS"]
    assert heard.got[0]["STATUS"].isprintable()
    assert len(heard.got[0]["STATUS"]) <= 500


async def test_a_later_daemon_listens_again(tmp_path: Path) -> None:
    found = Heard(tmp_path)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(found.path))
    notices = BootNotices(handle(tmp_path), found.notice)
    await notices.open()
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o666
    await found.say(b"READY=1")
    await found.until(1)
    await notices.close()
    await notices.close()


async def test_what_the_helper_put_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "symbolic").symlink_to(tmp_path / "secret")
    (tmp_path / "hard").hardlink_to(tmp_path / "secret")
    for name in ("symbolic", "hard"):
        with pytest.raises(FileExistsError, match="is not the socket"):
            notify._let_connect(tmp_path / name)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


async def test_nowhere_to_listen(tmp_path: Path) -> None:
    notices = BootNotices(handle(tmp_path / "missing"), lambda _: None)
    with pytest.raises(FailedPrecondition, match="nobody can listen for the readiness of the machine 0123456789abc"):
        await notices.open()
    await notices.close()


async def test_the_kernels_vsock_takes_the_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over sockets of another family, whose peers are said to have context ids."""
    bound = tmp_path / "host"
    peers = iter([(9, 1023), (CID, 1023)])

    def listen(cid: int) -> socket.socket:
        assert cid == CID
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        server.bind(str(bound))
        server.listen()
        return server

    loop = asyncio.get_running_loop()
    accept = loop.sock_accept

    async def accepted(server: socket.socket) -> tuple[socket.socket, tuple[int, int]]:
        connection, _ = await accept(server)
        return connection, next(peers)

    monkeypatch.setattr(notify, "_listen_native", listen)
    monkeypatch.setattr(loop, "sock_accept", accepted)
    found = Heard(tmp_path)
    found.path = bound
    notices = BootNotices(handle(tmp_path, native=True), found.notice)
    await notices.open()
    await found.say(b"READY=1\nSTATUS=a neighbour")
    await found.say(b"READY=1\nSTATUS=itself")
    await found.until(1)
    await notices.close()
    assert found.got == [{"READY": "1", "STATUS": "itself"}]
