"""A web server on loopback that does, for each request, just what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]

    @property
    def start(self) -> int:
        """The first byte asked for."""
        return int(self.headers["range"].removeprefix("bytes=").removesuffix("-")) if "range" in self.headers else 0


Send = Callable[[bytes], Awaitable[None]]
Answer = Callable[[Request, Send], Awaitable[None]]


@dataclasses.dataclass
class Web:
    """Requests in their order; the connection ends after each answer."""

    port: int
    requests: list[Request]
    scheme: str

    def url(self, path: str = "/disk.qcow2", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"


@contextlib.asynccontextmanager
async def web(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[Web]:
    requests: list[Request] = []
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            await one(reader, writer)
        except asyncio.CancelledError:
            pass  # a server's tasks are nobody's: asyncio would log it
        finally:
            serving.discard(task)
            writer.transport.abort()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError, TimeoutError):
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, target, _ = lines[0].split(" ", 2)
            fields = dict(line.split(": ", 1) for line in lines[1:] if line)
            request = Request(method, target, {name.lower(): value for name, value in fields.items()})
            requests.append(request)
            await answer(request, send)
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    async with server:
        try:
            yield Web(server.sockets[0].getsockname()[1], requests, "https" if tls else "http")
        finally:
            for task in list(serving):
                task.cancel()
            await asyncio.gather(*serving)


def head(status: int = 200, **fields: object) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def serve_file(
    request: Request, send: Send, content: bytes, *, etag: str = '"v1"', stop: int | None = None
) -> None:
    """Answer as an honest server with ranges does; `stop`: the connection ends before this byte of the file."""
    valid = request.headers.get("if-range", etag) == etag
    end = len(content) if stop is None else stop
    if request.method == "HEAD":
        await send(head(Content_Length=len(content), Accept_Ranges="bytes", ETag=etag))
        return
    if "range" in request.headers and valid:
        start = request.start
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        await send(head(206, Content_Length=len(content) - start, Content_Range=span, ETag=etag) + content[start:end])
    else:
        await send(head(Content_Length=len(content), Accept_Ranges="bytes", ETag=etag) + content[:end])
