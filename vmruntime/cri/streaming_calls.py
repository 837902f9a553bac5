"""CRI's calls that answer the URL of a stream."""

from __future__ import annotations

from typing import Any

from vmruntime.cri.lookup import full_id
from vmruntime.cri.ports import Streams
from vmruntime.cri.translate.checks import ARGUMENT_LIMIT, bad, missing, number, texts
from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated.cri_pb2_grpc import RuntimeServiceServicer
from vmruntime.model.container import ContainerState
from vmruntime.model.sandbox import SandboxState
from vmruntime.model.streams import AttachSpec, ExecSpec, PortForwardSpec
from vmruntime.pods.interface import Pods

_LAST_PORT = 65535
_ATTACHABLE = frozenset({ContainerState.CREATED, ContainerState.RUNNING})


class StreamingCalls(RuntimeServiceServicer):
    """Exec, Attach and PortForward; the attributes are RuntimeService's."""

    _pods: Pods
    _streams: Streams

    async def Exec(self, request: cri.ExecRequest, context: Any) -> cri.ExecResponse:
        """Return the URL on which a command will run, once, within a minute."""
        argv = texts("cmd", request.cmd, limit=ARGUMENT_LIMIT)
        if not argv or not argv[0]:
            raise missing("cmd")
        _check_streams(request)
        spec = ExecSpec(
            container_id=self._in_state(request.container_id, frozenset({ContainerState.RUNNING})),
            argv=argv,
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return cri.ExecResponse(url=self._streams.exec_url(spec))

    async def Attach(self, request: cri.AttachRequest, context: Any) -> cri.AttachResponse:
        """Return the URL of a container's streams."""
        _check_streams(request)
        spec = AttachSpec(
            container_id=self._in_state(request.container_id, _ATTACHABLE),
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return cri.AttachResponse(url=self._streams.attach_url(spec))

    async def PortForward(self, request: cri.PortForwardRequest, context: Any) -> cri.PortForwardResponse:
        """Return the URL of a sandbox's ports; which ports is mostly said by the streams, not by this request."""
        ports = [number(f"port[{i}]", port, low=1, high=_LAST_PORT) for i, port in enumerate(request.port)]
        if len(set(ports)) != len(ports):
            raise bad("port", ports, "names a port twice")
        sandbox_id = full_id(
            "pod_sandbox_id", request.pod_sandbox_id, lambda: (one.id for one in self._pods.sandboxes())
        )
        sandbox = self._pods.sandbox(sandbox_id)
        if sandbox.state is not SandboxState.READY:
            raise FailedPrecondition(f"the sandbox {sandbox.id} is {sandbox.state.value}, not ready")
        return cri.PortForwardResponse(
            url=self._streams.port_forward_url(PortForwardSpec(sandbox_id=sandbox.id, ports=ports))
        )

    def _in_state(self, given: str, states: frozenset[ContainerState]) -> str:
        container_id = full_id("container_id", given, lambda: (one.id for one in self._pods.containers()))
        container = self._pods.container(container_id)
        if container.state not in states:
            raise FailedPrecondition(f"the container {container.id} is {container.state.value}, not running")
        return container.id


def _check_streams(request: cri.ExecRequest | cri.AttachRequest) -> None:
    if request.tty and request.stderr:
        raise InvalidArgument("tty and stderr are both set, but a terminal has one output", remedy="clear stderr")
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidArgument("none of stdin, stdout and stderr is set")
