"""ExecSync: one command in a running container."""

from __future__ import annotations

from vmruntime.errors import DeadlineExceeded, InvalidArgument
from vmruntime.pods.context import Context
from vmruntime.pods.interface import ExecResult
from vmruntime.pods.streams import agent_of_running
from vmruntime.pods.vm_end import vm_end_told

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
    agent = agent_of_running(context, container_id)
    sandbox_id = context.registry.container(container_id).sandbox_id
    async with vm_end_told(context.running(sandbox_id).running):
        output = await agent.exec_sync(container_id, argv, timeout, OUTPUT_LIMIT)
    if output.end.timed_out:
        raise DeadlineExceeded(f"the command {argv[0]!r} was killed after {timeout:g} s, its time-out")
    stderr = output.stderr or (f"{output.end.error}\n".encode() if output.end.error else b"")
    return ExecResult(stdout=output.stdout, stderr=stderr, exit_code=output.end.exit_code)
