"""ExecSync: one command in a running container."""

from __future__ import annotations

from vmruntime.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument
from vmruntime.model.container import ContainerState
from vmruntime.pods.context import Context
from vmruntime.pods.interface import ExecResult

OUTPUT_LIMIT = 16 * 1024 * 1024


async def exec_sync(context: Context, container_id: str, argv: list[str], timeout: float) -> ExecResult:
    """Run a command to its end.

    A command that is not there gives the exit code a shell would (127, or 126), with the reason on stderr, so that an
    exec probe fails instead of being unknown.

    Raises:
        DeadlineExceeded: It was killed because `timeout` seconds had passed.
    """
    if not argv or not argv[0]:
        raise InvalidArgument.field("cmd", argv, "names no command")
    container = context.registry.container(container_id)
    if container.state is not ContainerState.RUNNING:
        raise FailedPrecondition(f"the container {container_id} is {container.state.value}, not running")
    agent = context.running(container.sandbox_id).running.agent
    output = await agent.exec_sync(container_id, argv, timeout, OUTPUT_LIMIT)
    if output.timed_out:
        raise DeadlineExceeded(f"the command {argv[0]!r} was killed after {timeout:g} s, its time-out")
    stderr = output.stderr or (f"{output.error}\n".encode() if output.error else b"")
    return ExecResult(stdout=output.stdout, stderr=stderr, exit_code=output.exit_code)
