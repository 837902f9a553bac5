"""The server: from a token in a URL to the session it stands for."""

from __future__ import annotations

import asyncio
import contextlib
import http
import ipaddress
import ssl
from pathlib import Path
from urllib.parse import parse_qs

import structlog

from vmruntime.aio.beside import beside
from vmruntime.aio.tasks import TaskScope
from vmruntime.clock import Clock, SystemClock
from vmruntime.config.settings import StreamingSettings
from vmruntime.errors import FailedPrecondition, InvalidArgument, Unavailable, VmruntimeError
from vmruntime.model.streams import AttachSpec, ExecSpec, PortForwardSpec
from vmruntime.pods.interface import Pods
from vmruntime.streaming import portforward, remote_spdy, remote_websocket
from vmruntime.streaming.channel_session import ChannelSession
from vmruntime.streaming.errors import ClientGone, ProtocolError, StreamingError
from vmruntime.streaming.http import BadRequest, HttpExchange, Request
from vmruntime.streaming.portforward import SpdyForwarder, forward_channels
from vmruntime.streaming.remote import RemoteStreams, run_attach, run_exec
from vmruntime.streaming.remote_spdy import SpdyRemote
from vmruntime.streaming.remote_websocket import WebSocketRemote
from vmruntime.streaming.session import SpdySession
from vmruntime.streaming.tokens import Tokens
from vmruntime.streaming.upgrade import Upgrade, answer_headers, upgrade_of
from vmruntime.streaming.websocket.channels import Channels, Tunnel
from vmruntime.streaming.wire import Idle, SocketWire, TunnelWire, Wire

log = structlog.get_logger(__name__)

CREATION_SECONDS = 30.0
"""For a client to open its streams, as Kubernetes has it."""

IDLE_SECONDS = 4 * 3600.0
"""Without any data, as Kubernetes has it."""

_PROTOCOL_ERROR = 1002
_KINDS = {"exec": ExecSpec, "attach": AttachSpec, "portforward": PortForwardSpec}


class StreamingServer:
    """Serves exec, attach and port-forward to whoever was given a URL."""

    def __init__(
        self,
        pods: Pods,
        settings: StreamingSettings,
        clock: Clock | None = None,
        *,
        creation_timeout: float = CREATION_SECONDS,
        idle_timeout: float = IDLE_SECONDS,
    ) -> None:
        self._pods = pods
        self._settings = settings
        self._tokens = Tokens(clock or SystemClock())
        self._creation_timeout = creation_timeout
        self._idle_timeout = idle_timeout
        self._scope = TaskScope("streaming")
        self._server: asyncio.Server | None = None
        self._base = ""

    async def start(self) -> None:
        """Begin to serve.

        Raises:
            InvalidArgument: Certificate or key cannot be used.
            Unavailable: The address cannot be listened on.
        """
        context = _tls(self._settings)
        address, port = self._settings.address, self._settings.port
        try:
            self._server = await asyncio.start_server(
                self._accept, address, port, ssl=context, ssl_handshake_timeout=10.0 if context else None
            )
        except OSError as error:
            raise Unavailable(
                f"streaming.address: cannot listen on {address} port {port}: {error.strerror or error}",
                remedy="choose another streaming.port, or 0 for any free one",
            ) from error
        bound = self._server.sockets[0].getsockname()
        self._base = f"{'https' if context else 'http'}://{_host(address)}:{bound[1]}"
        if not ipaddress.ip_address(address).is_loopback and context is None:
            log.warning("streams can be reached from other hosts without encryption", address=address)
        log.info("streaming server open", url=self._base)

    async def stop(self) -> None:
        """End every session and stop serving; may be repeated."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await self._scope.close()

    def exec_url(self, spec: ExecSpec) -> str:
        """Return the URL on which a command will run; raises ResourceExhausted when too many are handed out."""
        return f"{self._base}/exec/{self._tokens.issue(spec)}"

    def attach_url(self, spec: AttachSpec) -> str:
        """Return the URL of a container's streams."""
        return f"{self._base}/attach/{self._tokens.issue(spec)}"

    def port_forward_url(self, spec: PortForwardSpec) -> str:
        """Return the URL of a sandbox's ports."""
        return f"{self._base}/portforward/{self._tokens.issue(spec)}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()
            return
        self._scope.start(self._serve(reader, writer), "connection", owning=writer.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = HttpExchange(reader, writer)
        try:
            try:
                request = await exchange.request()
                spec = self._find(request)
                upgrade = upgrade_of(request, spec)
                await exchange.switch(answer_headers(upgrade))
            except BadRequest as error:
                await exchange.refuse(error)
                return
            wire = SocketWire(reader, writer, request.received)
            await self._session(wire, upgrade, spec, request)
        except (StreamingError, VmruntimeError) as error:
            log.info("streaming session ended", error=str(error))
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    def _find(self, request: Request) -> ExecSpec | AttachSpec | PortForwardSpec:
        """Return what the request's token stands for."""
        if request.method not in ("GET", "POST"):
            raise BadRequest(http.HTTPStatus.METHOD_NOT_ALLOWED, "only GET and POST", [("Allow", "GET, POST")])
        parts = request.path.split("/")
        spec = self._tokens.redeem(parts[2]) if len(parts) == 3 and parts[1] in _KINDS else None
        if spec is None or not isinstance(spec, _KINDS[parts[1]]):
            raise BadRequest(http.HTTPStatus.NOT_FOUND, "no such stream: its URL is unknown, used or expired")
        return spec

    async def _session(
        self, wire: Wire, upgrade: Upgrade, spec: ExecSpec | AttachSpec | PortForwardSpec, request: Request
    ) -> None:
        idle = Idle(self._idle_timeout)
        async with beside(idle.watch()):
            if upgrade.tunnelled:
                wire = TunnelWire(wire, Tunnel())
            if upgrade.websocket and not upgrade.tunnelled:
                await self._over_websocket(wire, upgrade.protocol, spec, request, idle)
            else:
                await self._over_spdy(wire, upgrade.protocol, spec, idle)

    async def _over_spdy(
        self, wire: Wire, protocol: str, spec: ExecSpec | AttachSpec | PortForwardSpec, idle: Idle
    ) -> None:
        process = not isinstance(spec, PortForwardSpec)
        limit = remote_spdy.STREAM_LIMIT if process else portforward.STREAM_LIMIT
        session = SpdySession(wire, stream_limit=limit, idle=idle)
        async with beside(session.run()):
            if isinstance(spec, PortForwardSpec):
                async with self._pods.ports(spec.sandbox_id) as ports:
                    await SpdyForwarder(session, ports, spec.sandbox_id, self._creation_timeout).run()
            else:
                remote = await SpdyRemote.open(session, protocol, spec, self._creation_timeout)
                await self._process(remote, spec)
            await session.close()

    async def _over_websocket(
        self,
        wire: Wire,
        protocol: str,
        spec: ExecSpec | AttachSpec | PortForwardSpec,
        request: Request,
        idle: Idle,
    ) -> None:
        numbers = _ports(spec, request) if isinstance(spec, PortForwardSpec) else []
        readable = range(0, 2 * len(numbers), 2) if numbers else remote_websocket.READABLE
        channels = Channels(protocol)
        session = ChannelSession(wire, channels, readable, idle)
        try:
            async with beside(session.run()):
                if isinstance(spec, PortForwardSpec):
                    await self._forward_channels(session, spec, numbers)
                else:
                    remote = WebSocketRemote(session, protocol, spec)
                    await self._process(remote, spec)
                await session.close()
        except ProtocolError:
            wire.send(channels.close(_PROTOCOL_ERROR))
            raise

    async def _process(self, remote: RemoteStreams, spec: ExecSpec | AttachSpec) -> None:
        if isinstance(spec, ExecSpec):
            await run_exec(remote, spec, self._pods.exec)
        else:
            await run_attach(remote, spec, self._pods.attach)

    async def _forward_channels(self, session: ChannelSession, spec: PortForwardSpec, numbers: list[int]) -> None:
        async def until_gone() -> None:
            await session.wait_gone()
            raise ClientGone("the client has gone")

        async with beside(until_gone()):
            try:
                async with self._pods.ports(spec.sandbox_id) as ports:
                    await forward_channels(session, ports, spec.sandbox_id, numbers)
            except VmruntimeError as error:
                log.info("port-forward failed", sandbox=spec.sandbox_id, error=str(error))


def _ports(spec: PortForwardSpec, request: Request) -> list[int]:
    """Return the ports a WebSocket client wants: those of the CRI request, else those of the query."""
    if spec.ports:
        return spec.ports
    given = [
        part for key in ("port", "ports") for value in parse_qs(request.query).get(key, []) for part in value.split(",")
    ]
    return [int(part) for part in given if portforward.is_port(part)]


def _host(address: str) -> str:
    """Return the host that URLs name: for an address that stands for all, this host's loopback, where kubelet is."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_unspecified:
        parsed = ipaddress.ip_address("127.0.0.1" if parsed.version == 4 else "::1")
    return f"[{parsed}]" if parsed.version == 6 else str(parsed)


def _tls(settings: StreamingSettings) -> ssl.SSLContext | None:
    if not settings.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for key, path in (("tls_cert", settings.tls_cert), ("tls_key", settings.tls_key)):
        if not Path(path).is_file():
            raise FailedPrecondition(f"streaming.{key}: {path!r} is not a file")
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (ssl.SSLError, OSError) as error:
        raise InvalidArgument.field(
            "streaming.tls_cert",
            settings.tls_cert,
            f"cannot be used with {settings.tls_key!r}: {error}",
            remedy="give a certificate and its key in PEM",
        ) from error
    return context
