"""The daemon's CRI socket, for code that waits: one call after the other."""

from __future__ import annotations

import socket
import types
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

import grpc

from vmruntime import errors
from vmruntime.errors import Code, Unavailable, VmruntimeError
from vmruntime.generated import cri_pb2_grpc, maintenance_pb2_grpc

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

# ExecSync may answer 16 MiB of each of two streams, and lists have no limit of their own.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_ERRORS: dict[int, type[VmruntimeError]] = {
    kind.code.value: kind
    for kind in (
        errors.InvalidArgument,
        errors.NotFound,
        errors.AlreadyExists,
        errors.FailedPrecondition,
        errors.PermissionDenied,
        errors.ResourceExhausted,
        errors.DeadlineExceeded,
        errors.Aborted,
        errors.Unavailable,
        errors.Unimplemented,
        errors.Internal,
    )
}


class Client:
    """The services of one daemon.

    Attributes:
        runtime: Pods and containers.
        image: Images.
        maintenance: What CRI has no call for, of images.
        machines: The same of pods.
        traces: What calls on pods did lately.
    """

    def __init__(self, address: Path) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(
            f"unix://{address.absolute()}",
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                # A proxy for the web is never on the way to a unix socket, whatever http_proxy says.
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self.runtime = cri_pb2_grpc.RuntimeServiceStub(self._channel)
        self.image = cri_pb2_grpc.ImageServiceStub(self._channel)
        self.maintenance = maintenance_pb2_grpc.ImageMaintenanceStub(self._channel)
        self.machines = maintenance_pb2_grpc.MachineMaintenanceStub(self._channel)
        self.traces = maintenance_pb2_grpc.PodTracesStub(self._channel)

    @classmethod
    def connect(cls, address: Path) -> Client:
        """Return a client of a daemon that answers.

        Raises:
            Unavailable: Nobody listens on the socket.
            PermissionDenied: The socket may not be used by this account.
        """
        check_listening(address)
        return cls(address)

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout: float | None = None,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> ResponseT:
        """Make one call and return its answer; the call is cancelled when this is interrupted.

        Args:
            method: Of `runtime` or `image`.
            request: What to send.
            timeout: Seconds; None waits as long as the daemon works.
            while_waiting: Called some ten times a second; what it raises interrupts the call.

        Raises:
            VmruntimeError: Of the class the daemon's status code stands for.
        """
        future = method.future(request, timeout=timeout)
        cancel: Callable[[], object] = future.cancel
        try:
            while True:
                try:
                    return future.result(timeout=0.1)
                except grpc.FutureTimeoutError:
                    while_waiting()
        except grpc.RpcError as error:
            raise self._translate(error) from error
        except BaseException:
            cancel()
            raise

    def _translate(self, error: grpc.RpcError) -> VmruntimeError:
        # Every RpcError of a call is also a grpc.Call; the type stubs do not say so.
        code, details = (error.code(), error.details() or "") if isinstance(error, grpc.Call) else (None, str(error))
        number = code.value[0] if code is not None else Code.INTERNAL.value
        if number == Code.UNAVAILABLE.value and details.startswith(("failed to connect", "Socket closed")):
            return Unavailable(
                f"the daemon on {self.address} went away before it answered", remedy="see what it last logged"
            )
        kind = _ERRORS.get(number, errors.Internal)
        return kind(details or f"the daemon answered {code.name if code is not None else 'nothing'}")


def check_listening(address: Path) -> None:
    """Raise Unavailable or PermissionDenied, saying what to do, unless somebody accepts on the socket."""
    remedy = "start the daemon: vmruntime serve"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(5)
            probe.connect(str(address))
    except FileNotFoundError:
        raise Unavailable(f"no vmruntime daemon: {address} does not exist", remedy=remedy) from None
    except ConnectionRefusedError:
        raise Unavailable(f"no vmruntime daemon: nobody listens on {address}", remedy=remedy) from None
    except PermissionError:
        raise errors.PermissionDenied(f"{address}: permission denied", remedy="run as root") from None
    except OSError as error:
        # Too long a path, a path that is no socket, or a daemon that does not accept any more.
        raise Unavailable(f"cannot connect to {address}: {error}", remedy=remedy) from error
