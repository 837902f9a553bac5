"""The one HTTP request with which every streaming connection begins."""

from __future__ import annotations

import asyncio
import dataclasses
import http
from collections.abc import Sequence

import h11

from vmruntime.streaming.errors import ClientGone

REQUEST_SECONDS = 10.0
HEAD_LIMIT = 64 * 1024
_CHUNK = 16 * 1024


@dataclasses.dataclass(frozen=True)
class Request:
    """What the client asks.

    Attributes:
        path: Without the query.
        query: What follows the question mark.
        headers: Names in lower case, in order.
        received: Bytes that came after the request.
    """

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    received: bytes

    def values(self, name: str) -> list[str]:
        """Return all values of a header."""
        return [value for key, value in self.headers if key == name]

    def mentions(self, name: str, word: str) -> bool:
        """Whether a header has a word in its comma-separated list."""
        return any(part.strip().lower() == word.lower() for value in self.values(name) for part in value.split(","))


class BadRequest(Exception):
    """Raised when the request is not to be had; answer with its status and text."""

    def __init__(self, status: int, text: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


class HttpExchange:
    """One request and its one answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)

    async def request(self) -> Request:
        """Read the request.

        Raises:
            BadRequest: It is malformed, has a body, or does not come in time.
            ClientGone: The client closed instead.
        """
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await self._event()
                if not isinstance(head, h11.Request):
                    raise ClientGone("the client asked nothing")
                if not isinstance(await self._event(), h11.EndOfMessage):
                    raise BadRequest(http.HTTPStatus.BAD_REQUEST, "a request with a body cannot be upgraded")
        except TimeoutError:
            raise BadRequest(http.HTTPStatus.REQUEST_TIMEOUT, "the request did not come in time") from None
        except h11.RemoteProtocolError as error:
            raise BadRequest(error.error_status_hint, str(error)) from error
        except OSError as error:
            raise ClientGone(str(error)) from error
        target = head.target.decode("latin-1")
        path, _, query = target.partition("?")
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers]
        return Request(head.method.decode(), path, query, headers, self._http.trailing_data[0])

    async def switch(self, headers: Sequence[tuple[str, str]]) -> None:
        """Answer 101: from here on the connection speaks something else."""
        answer = h11.InformationalResponse(status_code=101, headers=_encoded(headers), reason=b"Switching Protocols")
        await self._send(self._http.send(answer))

    async def refuse(self, error: BadRequest) -> None:
        """Answer with an error."""
        body = f"{error.text}\n".encode()
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            *error.headers,
        ]
        reason = http.HTTPStatus(error.status).phrase.encode()
        try:
            response = self._http.send(h11.Response(status_code=error.status, headers=_encoded(headers), reason=reason))
            response = (response or b"") + (self._http.send(h11.Data(data=body)) or b"")
            response += self._http.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError:
            return  # the request broke off where nothing can be answered
        await self._send(response)

    async def _event(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(_CHUNK))
        return event  # type: ignore[return-value]

    async def _send(self, data: bytes | None) -> None:
        try:
            self._writer.write(data or b"")
            await self._writer.drain()
        except OSError as error:
            raise ClientGone(str(error)) from error


def _encoded(headers: Sequence[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]
