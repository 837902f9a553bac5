"""The HTTP side: URLs, refusals, TLS, rubbish."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.streaming.conftest import Rig
from tests.unit.streaming.fakes import FakePods
from tests.unit.streaming.test_remote import READABLE, everything, spec
from vmruntime.config.settings import StreamingSettings
from vmruntime.errors import FailedPrecondition, InvalidArgument, Unavailable
from vmruntime.model.streams import AttachSpec
from vmruntime.streaming.client import open_channels
from vmruntime.streaming.server import StreamingServer
from vmruntime.streaming.websocket.channels import V5

SPDY = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"


async def ask(rig: Rig, request: str | bytes) -> bytes:
    """Send bytes and return all that comes back."""
    port = int(rig.server.exec_url(spec()).split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode("latin-1") if isinstance(request, str) else request)
    writer.write_eof()
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    return answer


def path(url: str) -> str:
    return "/" + url.split("/", 3)[3]


def get(target: str, headers: str = "", method: str = "GET") -> str:
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"


async def test_urls_are_absolute(rig: Rig) -> None:
    for kind, url in (
        ("exec", rig.server.exec_url(spec())),
        ("attach", rig.server.attach_url(AttachSpec(container_id="c"))),
    ):
        assert url.startswith("http://127.0.0.1:")
        assert f"/{kind}/" in url


async def test_a_token_opens_one_door_once(rig: Rig) -> None:
    exec_path = path(rig.server.exec_url(spec()))
    assert (await ask(rig, get(exec_path.replace("exec", "attach"), SPDY))).startswith(b"HTTP/1.1 404")
    assert (await ask(rig, get(exec_path, SPDY))).startswith(b"HTTP/1.1 404"), "used up by the wrong door"
    fresh = path(rig.server.exec_url(spec()))
    assert (await ask(rig, get(fresh, SPDY))).startswith(b"HTTP/1.1 101")
    assert (await ask(rig, get(fresh, SPDY))).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (get("/"), 404),
        (get("/exec/guess", SPDY), 404),
        (get("/exec/guess/more", SPDY), 404),
        (get("/exec/guess", SPDY, "DELETE"), 405),
        (get("/exec/x", "Content-Length: 3\r\n") + "abc", 400),
        ("rubbish\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        (get("/", f"X: {'x' * 100_000}\r\n"), 431),
    ],
)
async def test_refusals(rig: Rig, request_text: str, status: int) -> None:
    assert (await ask(rig, request_text)).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("method", "headers", "status", "says"),
    [
        ("GET", "", 400, b"upgrade"),
        ("GET", "Connection: Upgrade\r\nUpgrade: h2c\r\n", 400, b"upgrade"),
        (
            "POST",
            SPDY + "X-Stream-Protocol-Version: v9\r\n",
            403,
            b"X-Accepted-Stream-Protocol-Versions: v4.channel.k8s.io",
        ),
        ("POST", "Connection: Upgrade\r\nUpgrade: websocket\r\n", 405, b"GET"),
        ("GET", "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 8\r\n", 426, b"13"),
        (
            "GET",
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
            400,
            b"Sec-WebSocket-Key",
        ),
    ],
)
async def test_upgrades_that_cannot_be(rig: Rig, method: str, headers: str, status: int, says: bytes) -> None:
    answer = await ask(rig, get(path(rig.server.exec_url(spec())), headers, method))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert says.lower() in answer.lower()


async def test_spdy_answers_with_the_first_protocol_of_the_clients(rig: Rig) -> None:
    offers = "X-Stream-Protocol-Version: v3.channel.k8s.io\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n"
    answer = await ask(rig, get(path(rig.server.exec_url(spec())), SPDY + offers, "POST"))
    assert b"x-stream-protocol-version: v3.channel.k8s.io" in answer.lower()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rubbish=st.binary(max_size=300), upgraded=st.booleans())
async def test_rubbish_ends_the_connection_and_nothing_else(rig: Rig, rubbish: bytes, upgraded: bool) -> None:
    head = get(path(rig.server.exec_url(spec())), SPDY).encode() if upgraded else b""
    await ask(rig, head + rubbish)
    assert (await ask(rig, get("/"))).startswith(b"HTTP/1.1 404")


async def test_the_port_can_be_taken(rig: Rig) -> None:
    port = int(rig.server.exec_url(spec()).split(":")[2].split("/")[0])
    other = StreamingServer(FakePods(), StreamingSettings(port=port))  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match=f"port {port}"):
        await other.start()


@pytest.mark.parametrize(("address", "host"), [("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]")])
async def test_urls_name_a_host_that_can_be_reached(address: str, host: str) -> None:
    server = StreamingServer(FakePods(), StreamingSettings(address=address))  # type: ignore[arg-type]
    await server.start()
    async with open_channels(server.exec_url(spec()), [V5], READABLE):
        assert f"http://{host}:" in server.exec_url(spec())
    await server.stop()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = "subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*command.split(), "-addext", names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True
    )
    return str(cert), str(key)


async def test_tls(certificate: tuple[str, str]) -> None:
    cert, key = certificate
    server = StreamingServer(FakePods(), StreamingSettings(tls_cert=cert, tls_key=key))  # type: ignore[arg-type]
    await server.start()
    url = server.exec_url(spec(stdin=True))
    assert url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=cert)
    async with open_channels(url, [V5], READABLE, context) as (session, _):
        data = bytes(range(256)) * 4000
        await session.send(0, data)
        await session.close_channel(0)
        assert await everything((session, 1)) == data
    with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
        async with open_channels(server.exec_url(spec()), [V5], READABLE):
            pass
    await server.stop()


async def test_certificates_that_cannot_be_used(certificate: tuple[str, str], tmp_path: Path) -> None:
    cert, _ = certificate
    with pytest.raises(FailedPrecondition, match="streaming.tls_key"):
        await StreamingServer(FakePods(), StreamingSettings(tls_cert=cert, tls_key="/none")).start()  # type: ignore[arg-type]
    (tmp_path / "bad").write_text("no key")
    bad = StreamingSettings(tls_cert=cert, tls_key=str(tmp_path / "bad"))
    with pytest.raises(InvalidArgument, match=r"streaming\.tls_cert"):
        await StreamingServer(FakePods(), bad).start()  # type: ignore[arg-type]
