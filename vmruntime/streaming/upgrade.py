"""Which protocol a request asks for, and how the answer says yes."""

from __future__ import annotations

import dataclasses
import http
from collections.abc import Sequence

from vmruntime.model.streams import AttachSpec, ExecSpec, PortForwardSpec
from vmruntime.streaming import portforward, remote_spdy, remote_websocket
from vmruntime.streaming.http import BadRequest, Request
from vmruntime.streaming.websocket import handshake
from vmruntime.streaming.websocket.channels import V1

SPDY = "SPDY/3.1"


@dataclasses.dataclass(frozen=True)
class Upgrade:
    """What the connection speaks after the answer.

    Attributes:
        protocol: The chosen stream protocol.
        key: The answer to a WebSocket's key; empty for SPDY.
        named: Whether the client named protocols, so that the answer names one.
        tunnelled: Whether the WebSocket carries SPDY.
    """

    protocol: str
    websocket: bool = False
    tunnelled: bool = False
    key: str = ""
    named: bool = True


def upgrade_of(request: Request, spec: ExecSpec | AttachSpec | PortForwardSpec) -> Upgrade:
    """Return what to speak.

    Raises:
        BadRequest: The request asks for no upgrade, or for protocols that are not spoken here.
    """
    forward = isinstance(spec, PortForwardSpec)
    if request.mentions("connection", "upgrade"):
        if request.mentions("upgrade", "websocket"):
            return _websocket(request, forward=forward)
        if request.mentions("upgrade", SPDY):
            return _spdy(request, forward=forward)
    raise BadRequest(
        http.HTTPStatus.BAD_REQUEST,
        f"this URL is for a connection upgrade to {SPDY} or WebSocket",
        [("Upgrade", f"{SPDY}, websocket")],
    )


def answer_headers(upgrade: Upgrade) -> list[tuple[str, str]]:
    """Return the headers of the answer 101."""
    if not upgrade.websocket:
        return [("Connection", "Upgrade"), ("Upgrade", SPDY), ("X-Stream-Protocol-Version", upgrade.protocol)]
    headers = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", upgrade.key)]
    return [*headers, ("Sec-WebSocket-Protocol", upgrade.protocol)] if upgrade.named else headers


def _spdy(request: Request, *, forward: bool) -> Upgrade:
    spoken = portforward.SPDY_PROTOCOLS if forward else remote_spdy.PROTOCOLS
    asked = handshake.offered(request.values("x-stream-protocol-version"))
    chosen = handshake.choose(asked, spoken)
    if chosen is None:
        accepted = [("X-Accepted-Stream-Protocol-Versions", name) for name in spoken]
        raise _nothing_in_common(asked, spoken, accepted)
    # A client that names nothing is as old as the first version.
    return Upgrade(protocol=chosen or spoken[-1])


def _websocket(request: Request, *, forward: bool) -> Upgrade:
    if request.method != "GET":
        raise BadRequest(http.HTTPStatus.METHOD_NOT_ALLOWED, "a WebSocket begins with GET", [("Allow", "GET")])
    if request.values("sec-websocket-version") != [handshake.VERSION]:
        raise BadRequest(
            http.HTTPStatus.UPGRADE_REQUIRED,
            f"only WebSocket version {handshake.VERSION} is spoken here",
            [("Sec-WebSocket-Version", handshake.VERSION)],
        )
    keys = request.values("sec-websocket-key")
    key = handshake.accept_token(keys[0]) if len(keys) == 1 else None
    if key is None:
        raise BadRequest(http.HTTPStatus.BAD_REQUEST, "Sec-WebSocket-Key is missing or not 16 bytes in base64")
    tunnels = portforward.TUNNEL_PROTOCOLS if forward else ()
    spoken = (*tunnels, *portforward.CHANNEL_PROTOCOLS) if forward else remote_websocket.PROTOCOLS
    asked = handshake.offered(request.values("sec-websocket-protocol"))
    chosen = handshake.choose(asked, spoken)
    if chosen is None:
        raise _nothing_in_common(asked, spoken, [])
    fallback = portforward.CHANNEL_PROTOCOLS[0] if forward else V1
    return Upgrade(
        protocol=chosen or fallback, websocket=True, tunnelled=chosen in tunnels, key=key, named=bool(chosen)
    )


def _nothing_in_common(asked: Sequence[str], spoken: Sequence[str], headers: list[tuple[str, str]]) -> BadRequest:
    text = f"no protocol in common: the client offers {', '.join(asked)}; spoken here are {', '.join(spoken)}"
    return BadRequest(http.HTTPStatus.FORBIDDEN, text, headers)
