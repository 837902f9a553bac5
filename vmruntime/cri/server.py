"""The gRPC server on the CRI socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

import grpc
import structlog

from vmruntime import tracing
from vmruntime.clock import Clock, SystemClock
from vmruntime.config.settings import Settings
from vmruntime.cri.image_maintenance import ImageMaintenance
from vmruntime.cri.image_service import ImageService
from vmruntime.cri.interceptors import CallInterceptor
from vmruntime.cri.machine_maintenance import MachineMaintenance
from vmruntime.cri.pod_traces import PodTraces
from vmruntime.cri.ports import Conditions, Images, Machines, NodeNetwork, Streams
from vmruntime.cri.runtime_service import RuntimeService
from vmruntime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unavailable
from vmruntime.generated import cri_pb2_grpc, maintenance_pb2_grpc
from vmruntime.model.sandbox import SandboxKind
from vmruntime.paths import Paths
from vmruntime.pods.interface import Pods

log = structlog.get_logger(__name__)

# kubelet and crictl use the same limit (16 MiB), in both directions.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# sun_path holds 108 bytes with the final NUL (unix(7)); the private directory's name takes some of them.
_SOCKET_PATH_LIMIT = 107
_PROBE_SECONDS = 2.0


class CriServer:
    """Serves both CRI services on a unix socket that only its owner may connect to.

    gRPC binds a path with the process's umask and quietly takes over whatever socket is there. So it is made to bind
    inside a private directory, and the socket moves to its place once its mode is right.
    """

    def __init__(
        self,
        *,
        pods: Pods,
        images: Images,
        machines: Machines,
        conditions: Conditions,
        streams: Streams,
        node_network: NodeNetwork,
        settings: Settings,
        kinds: frozenset[SandboxKind],
        socket: Path,
        clock: Clock | None = None,
    ) -> None:
        """Make the services; nothing is opened before start().

        Args:
            pods: The use cases on pods.
            images: The image service.
            machines: The machines of image pods.
            conditions: Whether the runtime and its network are ready.
            streams: Gives out the URLs of exec, attach and port-forward.
            node_network: Is told the node's pod CIDRs.
            settings: Default kind, cgroup driver and root directory are used.
            kinds: The kinds of pods that can run here.
            socket: Path of the CRI socket.
            clock: Dates answers; the host's clock when None.
        """
        clock = clock or SystemClock()
        self._socket = socket
        self._runtime = RuntimeService(
            pods,
            conditions,
            clock,
            streams,
            node_network,
            default_kind=SandboxKind(settings.default_kind),
            supported=kinds,
            cgroup_driver=settings.cgroup_driver,
            privileged_on_host=settings.host_pods == "privileged",
            writable_mountpoint=str(Paths(root=Path(settings.root)).pods),
        )
        self._images = ImageService(images, clock)
        self._maintenance = ImageMaintenance(images)
        self._machines = MachineMaintenance(pods, machines)
        self._server: grpc.aio.Server | None = None
        self._inode: tuple[int, int] | None = None

    async def start(self) -> None:
        """Begin to serve; clients can connect when this returns.

        Raises:
            AlreadyExists: A live daemon answers on the socket.
            FailedPrecondition: Something that is not a socket is in its place.
            InvalidArgument: The path is too long for a socket.
            Unavailable: The directory or the socket cannot be made.
        """
        # The private directory's name is of fixed length, so a path this long may not work there.
        if len(os.fsencode(self._socket.parent / ".cri-xxxxxxxx" / "s")) > _SOCKET_PATH_LIMIT or (
            len(os.fsencode(self._socket)) > _SOCKET_PATH_LIMIT
        ):
            raise InvalidArgument(
                f"socket: {str(self._socket)!r} is too long; a socket's path has at most {_SOCKET_PATH_LIMIT} bytes"
            )
        await _refuse_if_taken(self._socket)
        server = grpc.aio.server(
            interceptors=[CallInterceptor()],
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ],
        )
        cri_pb2_grpc.add_RuntimeServiceServicer_to_server(self._runtime, server)
        cri_pb2_grpc.add_ImageServiceServicer_to_server(self._images, server)
        maintenance_pb2_grpc.add_ImageMaintenanceServicer_to_server(self._maintenance, server)
        maintenance_pb2_grpc.add_MachineMaintenanceServicer_to_server(self._machines, server)
        maintenance_pb2_grpc.add_PodTracesServicer_to_server(PodTraces(tracing.RECORDER), server)
        try:
            self._socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # mkdtemp makes the directory with mode 0700.
            private = Path(tempfile.mkdtemp(prefix=".cri-", dir=self._socket.parent))
        except OSError as error:
            raise Unavailable(f"cannot make the directory of the socket {self._socket}: {error}") from error
        try:
            bound = private / "s"
            server.add_insecure_port(f"unix:{bound}")
            await server.start()
            bound.chmod(0o600)
            status = bound.stat()
            bound.replace(self._socket)
        except (OSError, RuntimeError) as error:
            await server.stop(None)
            raise Unavailable(f"cannot listen on {self._socket}: {error}") from error
        finally:
            shutil.rmtree(private, ignore_errors=True)
        self._inode = (status.st_dev, status.st_ino)
        self._server = server
        log.info("cri socket open", socket=str(self._socket))

    async def __aenter__(self) -> CriServer:
        """Start; the block is left with stop()."""
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop."""
        await self.stop()

    async def stop(self, grace: float = 5.0) -> None:
        """Refuse new calls, let those under way end within `grace` seconds, then cancel them; may be repeated."""
        server, self._server = self._server, None
        if server is None:
            return
        self._runtime.close()  # event streams never end by themselves
        await server.stop(grace)
        # A daemon that took over meanwhile has its own socket there.
        with contextlib.suppress(OSError):
            status = self._socket.stat(follow_symlinks=False)
            if (status.st_dev, status.st_ino) == self._inode:
                self._socket.unlink()
        log.info("cri socket closed", socket=str(self._socket))


async def _refuse_if_taken(socket: Path) -> None:
    """Return if the path is free or holds a socket nobody listens on; the bind will replace that one."""
    try:
        mode = socket.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise Unavailable(f"cannot look at the socket {socket}: {error}") from error
    if not stat.S_ISSOCK(mode):
        raise FailedPrecondition(f"{socket} exists and is not a socket", remedy="move it away")
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            _, writer = await asyncio.open_unix_connection(str(socket))
    except ConnectionRefusedError:
        log.info("stale cri socket replaced", socket=str(socket))
        return
    except (OSError, TimeoutError) as error:
        # A full backlog or a refused permission: somebody owns it.
        raise AlreadyExists(f"{socket} is in use: {error or 'no answer'}") from error
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    raise AlreadyExists(
        f"another daemon answers on {socket}", remedy="stop it, or configure another socket for this one"
    )
