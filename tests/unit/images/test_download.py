"""Downloads from servers that are honest, and from others."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.images.certificates import Certificates
from tests.unit.images.web import Answer, Request, Send, head, serve_file, web
from vmruntime.aio import process
from vmruntime.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    VmruntimeError,
)
from vmruntime.images import curl, download
from vmruntime.images.download import Downloaded, Downloader
from vmruntime.images.endpoint import Checksum, Endpoint, Tls, Transport
from vmruntime.images.manifest import BadImage
from vmruntime.images.part import Part
from vmruntime.images.scratch import ScratchSpace
from vmruntime.images.skopeo_errors import RegistryUnavailable

MIB = 1024 * 1024
CONTENT = random.Random(1).randbytes(3 * MIB + 17)
OTHER = random.Random(2).randbytes(2 * MIB)
LIMIT = 64 * MIB


def sha256(content: bytes) -> Checksum:
    return Checksum("sha256", hashlib.sha256(content).hexdigest())


@pytest.fixture(autouse=True)
def direct_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(download, "BACKOFF", (0.01, 0.01))
    monkeypatch.setattr(download, "POLL", 0.01)


class Bed:
    """A downloader, its directories, and what may be left in them."""

    def __init__(self, root: Path) -> None:
        self.parts = root / "parts"
        self.homes = root / "homes"
        self.target = root / "disk.qcow2"
        self.downloader = Downloader(self.parts, ScratchSpace(self.homes))

    async def fetch(self, url: str, *, limit: int = LIMIT, progress: Any = None, **members: Any) -> Downloaded:
        endpoint = Endpoint(url=url, **members)
        return await self.downloader.fetch(endpoint, self.target, limit=limit, progress=progress)

    def whole(self, content: bytes, found: Downloaded) -> None:
        """Assert that a content is in its place, and nothing beside it."""
        assert found == Downloaded(len(content), str(sha256(content)))
        assert self.target.read_bytes() == content
        assert self.left() == []

    def left(self) -> list[str]:
        assert list(self.homes.glob("*")) == []
        return sorted(path.suffix for path in self.parts.glob("*"))

    async def refused(
        self, kind: type[VmruntimeError], words: str, fetching: Awaitable[object], left: Sequence[str] = ()
    ) -> None:
        with pytest.raises(kind) as refusal:
            await fetching
        assert words in str(refusal.value)
        assert not self.target.exists()
        assert self.left() == list(left)


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


def honest(content: bytes = CONTENT) -> Answer:
    return lambda request, send: serve_file(request, send, content)


def in_turn(*answers: Answer) -> Answer:
    """Let each answer serve one request, and the last all that follow."""
    left = list(answers)

    async def answer(request: Request, send: Send) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(request, send)

    return answer


def says(data: bytes) -> Answer:
    return lambda request, send: send(data)


def cut(stop: int, content: bytes = CONTENT, **options: Any) -> Answer:
    return lambda request, send: serve_file(request, send, content, stop=stop, **options)


async def test_a_file(bed: Bed) -> None:
    seen: list[tuple[int, int | None]] = []

    async def slowly(request: Request, send: Send) -> None:
        await send(head(Content_Length=len(CONTENT)) + CONTENT[:MIB])
        while not any(size for size, _ in seen):
            await asyncio.sleep(0.01)
        await send(CONTENT[MIB:])

    async with web(slowly) as server:
        found = await bed.fetch(
            server.url(), progress=lambda size, total: seen.append((size, total)), checksum=sha256(CONTENT)
        )
    bed.whole(CONTENT, found)
    assert {total for size, total in seen if size} == {len(CONTENT)}
    assert bed.target.stat().st_mode & 0o777 == 0o600
    assert server.requests[0].headers["user-agent"] == "vmruntime"


async def test_lengths_that_are_not_said(bed: Bed) -> None:
    async def chunked(request: Request, send: Send) -> None:
        await send(head(Transfer_Encoding="chunked"))
        for start in range(0, len(CONTENT), MIB):
            chunk = CONTENT[start : start + MIB]
            await send(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        await send(b"0\r\n\r\n")

    for answer, content in ((chunked, CONTENT), (says(head() + CONTENT), CONTENT), (says(head(Content_Length=0)), b"")):
        async with web(answer) as server:
            bed.whole(content, await bed.fetch(server.url()))


async def test_an_interrupted_download_goes_on(bed: Bed) -> None:
    async with web(in_turn(cut(MIB), cut(2 * MIB), honest())) as server:
        bed.whole(CONTENT, await bed.fetch(server.url()))
    assert [request.start for request in server.requests] == [0, MIB, 2 * MIB]
    assert [request.headers.get("if-range") for request in server.requests] == [None, '"v1"', '"v1"']


async def test_another_daemon_goes_on(bed: Bed, tmp_path: Path) -> None:
    """The first one is ended in the middle of a transfer; what it has is used by the next."""
    stalled = asyncio.Event()

    async def stall(request: Request, send: Send) -> None:
        await serve_file(request, send, CONTENT, stop=2 * MIB)
        stalled.set()
        await asyncio.sleep(60)

    async with web(in_turn(stall, honest())) as server:
        fetching = asyncio.ensure_future(bed.fetch(server.url()))
        await stalled.wait()
        part = next(bed.parts.glob("*.part"))
        while part.stat().st_size < 2 * MIB:
            await asyncio.sleep(0.01)
        fetching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await fetching
        assert bed.left() == [".head", ".part"]
        assert not bed.target.exists()
        later = Bed(tmp_path)
        later.whole(CONTENT, await later.fetch(server.url()))
    assert [request.start for request in server.requests] == [0, 2 * MIB]


async def test_a_whole_part_is_not_fetched_again(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(part: object, target: Path) -> int:
        raise OSError(28, "No space left on device", str(target))

    async with web(honest()) as server:
        with monkeypatch.context() as broken:
            broken.setattr(Part, "settle", full)
            await bed.refused(
                ResourceExhausted, "cannot be kept: No space left", bed.fetch(server.url()), [".head", ".part"]
            )
        bed.whole(CONTENT, await bed.fetch(server.url()))
    assert len(server.requests) == 1


async def test_a_file_that_changed_in_between(bed: Bed) -> None:
    new = lambda request, send: serve_file(request, send, OTHER, etag='"v2"')  # noqa: E731
    async with web(in_turn(cut(MIB), new)) as server:
        bed.whole(OTHER, await bed.fetch(server.url()))
    assert [request.start for request in server.requests] == [0, MIB, 0]


async def test_a_file_that_became_shorter(bed: Bed) -> None:
    async def short(request: Request, send: Send) -> None:
        if request.start:
            await send(head(416, Content_Range="bytes */5", Content_Length=0))
        else:
            await send(head(Content_Length=5) + b"short")

    async with web(in_turn(cut(MIB), short)) as server:
        bed.whole(b"short", await bed.fetch(server.url()))


@pytest.mark.parametrize(
    ("fields", "checksum", "starts"),
    [
        ({"Last_Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, False, [0, MIB]),
        ({}, True, [0, MIB]),
        ({}, False, [0, 0]),
        ({"ETag": 'W/"weak"'}, False, [0, 0]),
        ({"ETag": '"v1"', "Accept_Ranges": "none"}, True, [0, 0]),
        ({"ETag": '"v1"', "Content_Encoding": "gzip"}, True, [0, 0]),
    ],
)
async def test_when_a_part_can_be_kept(bed: Bed, fields: dict[str, Any], checksum: bool, starts: list[int]) -> None:
    begins = says(head(Content_Length=len(CONTENT), **fields) + CONTENT[:MIB])

    async def goes_on(request: Request, send: Send) -> None:
        if request.start:
            span = f"bytes {request.start}-{len(CONTENT) - 1}/{len(CONTENT)}"
            await send(
                head(206, Content_Range=span, Content_Length=len(CONTENT) - request.start) + CONTENT[request.start :]
            )
        else:
            await send(head(Content_Length=len(CONTENT)) + CONTENT)

    async with web(in_turn(begins, goes_on)) as server:
        bed.whole(CONTENT, await bed.fetch(server.url(), checksum=sha256(CONTENT) if checksum else None))
    assert [request.start for request in server.requests] == starts


async def test_a_wrong_checksum(bed: Bed) -> None:
    async with web(honest()) as server:
        words = f"/disk.qcow2: has the checksum {sha256(CONTENT)}, not {sha256(OTHER)} (correct the checksum"
        await bed.refused(BadImage, words, bed.fetch(server.url(), checksum=sha256(OTHER)))
        assert len(server.requests) == 1
        sha512 = Checksum("sha512", hashlib.sha512(CONTENT).hexdigest())
        both = bed.downloader.fetch(
            Endpoint(url=server.url(), checksum=sha512), bed.target, limit=LIMIT, checksums=[sha256(OTHER)]
        )
        await bed.refused(BadImage, "not sha256:", both)
        bed.whole(CONTENT, await bed.fetch(server.url(), checksum=sha512))


async def test_a_server_that_lies_about_the_rest(bed: Bed) -> None:
    """It goes on with another file in spite of If-Range; the checksum tells, and the second time all is fetched."""

    async def lies(request: Request, send: Send) -> None:
        await serve_file(request, send, CONTENT, etag=request.headers.get("if-range", '"v1"'))

    async with web(in_turn(cut(MIB, OTHER + OTHER[: len(CONTENT) - len(OTHER)]), lies)) as server:
        bed.whole(CONTENT, await bed.fetch(server.url(), checksum=sha256(CONTENT)))
    assert [request.start for request in server.requests] == [0, MIB, 0]
    bed.target.unlink()
    async with web(lambda request, send: serve_file(request, send, OTHER, stop=request.start + MIB)) as server:
        await bed.refused(BadImage, "has the checksum", bed.fetch(server.url(), checksum=sha256(CONTENT)))
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "span", ["bytes 0-9/{total}", "bytes {next}-{last}/{total}", "bytes {start}-{last}/99999999", "nonsense"]
)
async def test_a_server_that_sends_other_parts(bed: Bed, span: str) -> None:
    async def lies(request: Request, send: Send) -> None:
        if not request.start:
            await serve_file(request, send, CONTENT, stop=MIB)
        else:
            text = span.format(start=request.start, next=request.start + 1, last=len(CONTENT) - 1, total=len(CONTENT))
            await send(
                head(206, Content_Range=text, Content_Length=len(CONTENT) - request.start) + CONTENT[request.start :]
            )

    async with web(lies) as server:
        await bed.refused(BadImage, "the server does not send what it is asked for", bed.fetch(server.url()))
    assert [request.start for request in server.requests] == [0, MIB] * 3


async def test_a_part_nobody_asked_for(bed: Bed) -> None:
    part = says(head(206, Content_Range=f"bytes 5-9/{len(CONTENT)}", Content_Length=5) + b"xxxxx")
    async with web(in_turn(part, honest())) as server:
        bed.whole(CONTENT, await bed.fetch(server.url()))


async def test_parts_that_are_too_small(bed: Bed) -> None:
    async def little(request: Request, send: Send) -> None:
        start, last = request.start, min(request.start + MIB, len(CONTENT)) - 1
        status = 206 if start else 200
        length = len(CONTENT) if status == 200 else last + 1 - start
        fields = {"Content_Range": f"bytes {start}-{last}/{len(CONTENT)}"} if start else {}
        await send(head(status, Content_Length=length, ETag='"v1"', **fields) + CONTENT[start : last + 1])

    async with web(little) as server:
        bed.whole(CONTENT, await bed.fetch(server.url()))
    assert [request.start for request in server.requests] == [0, MIB, 2 * MIB, 3 * MIB]


async def test_a_server_without_an_end(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PIECES", 5)

    async def drop(request: Request, send: Send) -> None:
        await serve_file(request, send, CONTENT, stop=request.start + 10)

    async with web(drop) as server:
        await bed.refused(BadImage, "has not arrived in 5 pieces", bed.fetch(server.url()), [".head", ".part"])
    assert len(server.requests) == 5


async def test_files_that_are_too_large(bed: Bed) -> None:
    async def endless(request: Request, send: Send) -> None:
        await send(head(Transfer_Encoding="chunked"))
        while True:
            await send(b"100000\r\n" + bytes(MIB) + b"\r\n")

    for answer in (honest(), endless):
        async with web(answer) as server:
            await bed.refused(ResourceExhausted, "is larger than 2097152 bytes", bed.fetch(server.url(), limit=2 * MIB))
    async with web(honest()) as server:
        bed.whole(CONTENT, await bed.fetch(server.url(), limit=len(CONTENT)))


@pytest.mark.parametrize(
    ("status", "kind", "words", "asked"),
    [
        (404, NotFound, "the server answers with status 404 (correct the image's name or the URL", 1),
        (401, PermissionDenied, "the server answers with status 401 (give it a user and password", 1),
        (403, PermissionDenied, "status 403", 1),
        (418, FailedPrecondition, "status 418", 1),
        (304, FailedPrecondition, "status 304", 1),
        (204, FailedPrecondition, "status 204", 1),
        (503, RegistryUnavailable, "status 503 (check the server)", 3),
        (429, RegistryUnavailable, "status 429", 3),
    ],
)  # fmt: skip
async def test_refusals(bed: Bed, status: int, kind: type[VmruntimeError], words: str, asked: int) -> None:
    async with web(says(head(status, Content_Length=0))) as server:
        await bed.refused(kind, words, bed.fetch(server.url().replace("//", "//user:pa55word@")))
        assert len(server.requests) == asked


async def test_a_moment_of_trouble(bed: Bed) -> None:
    async with web(
        in_turn(says(head(503, Content_Length=0)), says(b""), cut(MIB), says(head(500)), honest())
    ) as server:
        bed.whole(CONTENT, await bed.fetch(server.url()))
    assert [request.start for request in server.requests] == [0, 0, 0, MIB, MIB]


async def test_no_server(bed: Bed) -> None:
    async with web(honest()) as server:
        url = server.url()
    await bed.refused(RegistryUnavailable, f"RegistryUnavailable: {url}: Failed to connect", bed.fetch(url))
    await bed.refused(RegistryUnavailable, "Could not resolve host", bed.fetch("http://no-such-host.invalid/x"))


async def test_what_is_no_http(bed: Bed) -> None:
    async with web(says(b"SSH-2.0-OpenSSH_9.2\r\n")) as server:
        await bed.refused(
            FailedPrecondition, "leads to what is not fetched: Received HTTP/0.9", bed.fetch(server.url())
        )


async def test_a_server_that_stalls(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curl, "STALL_TIMEOUT", 1.0)

    async def stall(request: Request, send: Send) -> None:
        await serve_file(request, send, CONTENT, stop=1)  # curl looks at the mean of some seconds
        await asyncio.sleep(30)

    async with web(in_turn(stall, honest())) as server:
        bed.whole(CONTENT, await bed.fetch(server.url()))
    assert [request.start for request in server.requests] == [0, 1]


async def test_the_time_is_up(bed: Bed) -> None:
    async def drip(request: Request, send: Send) -> None:
        await send(head(Content_Length=len(CONTENT), ETag='"v1"'))
        for byte in CONTENT:
            await send(bytes([byte]))
            await asyncio.sleep(0.05)

    transport = Transport(timeout=1.0)
    async with web(in_turn(drip, honest())) as server:
        words = "was not fetched within 1 s (raise timeout of the rule's transport; what has arrived is kept)"
        await bed.refused(DeadlineExceeded, words, bed.fetch(server.url(), transport=transport), [".head", ".part"])
        bed.whole(CONTENT, await bed.fetch(server.url()))
        assert server.requests[1].start > 0


def redirect(target: Callable[[Request], str]) -> Answer:
    return lambda request, send: send(head(302, Location=target(request), Content_Length=0))


async def test_redirects(bed: Bed) -> None:
    async def two(request: Request, send: Send) -> None:
        left = int(request.target.strip("/"))
        await (redirect(lambda _: f"/{left - 1}")(request, send) if left else serve_file(request, send, CONTENT))

    async with web(two) as server:
        bed.whole(CONTENT, await bed.fetch(server.url("/9")))
        bed.target.unlink()
        await bed.refused(
            FailedPrecondition, "redirects more than 9 times (raise maxRedirects", bed.fetch(server.url("/10"))
        )
        once = Transport(max_redirects=1)
        await bed.refused(
            FailedPrecondition, "redirects more than 1 times", bed.fetch(server.url("/2"), transport=once)
        )
        bed.whole(CONTENT, await bed.fetch(server.url("/1"), transport=once))


async def test_what_a_redirect_may_not_lead_to(bed: Bed, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for target in (f"file://{tmp_path}/secret", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x"):
        async with web(redirect(lambda _, target=target: target)) as server:  # type: ignore[misc]
            await bed.refused(FailedPrecondition, "leads to what is not fetched: Protocol", bed.fetch(server.url()))


async def test_a_redirect_keeps_the_password_to_itself(bed: Bed) -> None:
    async with web(honest()) as other, web(redirect(lambda _: other.url(host="localhost"))) as server:
        bed.whole(CONTENT, await bed.fetch(server.url().replace("//", "//user:pa55@")))
    assert "authorization" in server.requests[0].headers
    assert "authorization" not in other.requests[0].headers


async def test_secrets_are_in_no_argument(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = process.run

    async def run(argv: Sequence[str], **options: Any) -> process.Completed:
        seen.extend(argv)
        return await real(argv, **options)

    monkeypatch.setattr(process, "run", run)
    async with web(honest()) as server:
        bed.whole(CONTENT, await bed.fetch(server.url().replace("//", "//user:pa55@")))
        assert server.requests[0].headers["authorization"] == "Basic dXNlcjpwYTU1"
    assert seen
    assert not any("pa55" in word for word in seen)


async def test_odd_urls(bed: Bed) -> None:
    async with web(honest()) as server:
        bed.whole(CONTENT, await bed.fetch(server.url("/a[1-3]/%22x%22/../y?q=a&b=\\".replace("\\", "%5C"))))
    assert server.requests[0].target == "/a[1-3]/%22x%22/../y?q=a&b=%5C"


async def test_a_proxy(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")  # of the environment, not for a rule's own
    async with web(honest()) as proxy:
        through = Transport(proxy=f"http://user:pa55@127.0.0.1:{proxy.port}")
        bed.whole(CONTENT, await bed.fetch("http://images.invalid/disk", transport=through))
        assert proxy.requests[0].target == "http://images.invalid/disk"
        assert proxy.requests[0].headers["proxy-authorization"] == "Basic dXNlcjpwYTU1"
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.setenv("http_proxy", proxy.url(""))
        bed.whole(CONTENT, await bed.fetch("http://images.invalid/other"))


async def test_tls(bed: Bed, certificates: Certificates) -> None:
    trusted = Transport(tls=Tls(authorities=certificates.pem("ca")))
    async with web(honest(), certificates.server()) as server:
        await bed.refused(
            FailedPrecondition,
            "the server's certificate is not trusted: SSL certificate problem",
            bed.fetch(server.url()),
        )
        bed.whole(CONTENT, await bed.fetch(server.url(), transport=trusted))
        bed.whole(CONTENT, await bed.fetch(server.url(), transport=Transport(tls=Tls(insecure=True))))


async def test_another_name_in_the_certificate(bed: Bed, certificates: Certificates) -> None:
    authorities = certificates.pem("ca")
    async with web(honest(), certificates.server("other")) as server:
        await bed.refused(
            FailedPrecondition,
            "is not trusted: SSL",
            bed.fetch(server.url(), transport=Transport(tls=Tls(authorities=authorities))),
        )
        named = Transport(tls=Tls(authorities=authorities, server_name="images.example"))
        bed.whole(CONTENT, await bed.fetch(server.url(), transport=named))
    assert server.requests[-1].headers["host"] == f"127.0.0.1:{server.port}"


async def test_a_client_certificate(bed: Bed, certificates: Certificates) -> None:
    authorities = certificates.pem("ca")
    client = certificates.pem("client") + certificates.key("client")
    async with web(honest(), certificates.server(clients=True)) as server:
        ours = Transport(tls=Tls(authorities=authorities, client=client))
        bed.whole(CONTENT, await bed.fetch(server.url(), transport=ours))
        bed.target.unlink()
        nobody = Transport(tls=Tls(authorities=authorities))
        await bed.refused(
            RegistryUnavailable, "RegistryUnavailable: https://", bed.fetch(server.url(), transport=nobody)
        )


async def test_from_tls_to_plain_text(bed: Bed, certificates: Certificates) -> None:
    trusted = Transport(tls=Tls(authorities=certificates.pem("ca")))
    async with web(honest()) as plain, web(redirect(lambda _: plain.url()), certificates.server()) as server:
        await bed.refused(
            FailedPrecondition,
            "https may lead to http only where there is a checksum",
            bed.fetch(server.url(), transport=trusted),
        )
        assert plain.requests == []
        bed.whole(CONTENT, await bed.fetch(server.url(), transport=trusted, checksum=sha256(CONTENT)))


async def test_two_at_once(bed: Bed) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait(request: Request, send: Send) -> None:
        begun.set()
        await go_on.wait()
        await serve_file(request, send, CONTENT)

    async with web(wait) as server:
        first = asyncio.ensure_future(bed.fetch(server.url()))
        await begun.wait()
        with pytest.raises(Aborted, match="is being fetched already"):
            await bed.fetch(server.url())
        assert await bed.downloader.sweep(-60) == 0
        go_on.set()
        bed.whole(CONTENT, await first)


async def test_local_files(bed: Bed, tmp_path: Path) -> None:
    source = tmp_path / "my disk.qcow2"
    source.write_bytes(CONTENT)
    url = source.as_uri()
    bed.whole(CONTENT, await bed.fetch(url, checksum=sha256(CONTENT)))
    bed.target.unlink()
    await bed.refused(BadImage, "has the checksum", bed.fetch(url, checksum=sha256(OTHER)))
    await bed.refused(ResourceExhausted, f"has {len(CONTENT)} bytes; 1048576 are allowed", bed.fetch(url, limit=MIB))
    await bed.refused(NotFound, "there is no such file", bed.fetch(f"{url}x"))
    await bed.refused(FailedPrecondition, "is not a file", bed.fetch(tmp_path.as_uri()))
    await bed.refused(FailedPrecondition, "is not a file", bed.fetch("file:///dev/zero"))


async def test_sweep(bed: Bed) -> None:
    async with web(cut(MIB)) as server:
        with pytest.raises(RegistryUnavailable):
            await bed.fetch(server.url())
    assert bed.left() == [".head", ".part"]
    assert await bed.downloader.sweep(3600) == 0
    assert bed.left() == [".head", ".part"]
    assert await bed.downloader.sweep(-60) == 1
    assert bed.left() == []
    assert await Downloader(bed.parts / "absent", ScratchSpace(bed.homes)).sweep(0) == 0


async def test_without_curl(bed: Bed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for program in ("setpriv", "prlimit"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    monkeypatch.setenv("PATH", str(tmp_path))
    await bed.refused(FailedPrecondition, "the program 'curl' is not installed", bed.fetch("http://127.0.0.1:1/"))
