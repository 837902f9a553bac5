"""Watches a running sandbox: what its agent reports, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import GuestContainerState, GuestPhase
from vmruntime.errors import NotFound, VmruntimeError
from vmruntime.metrics.instruments import OOM_KILLS, SANDBOX_DEATHS
from vmruntime.model.container import Container, ContainerState
from vmruntime.model.sandbox import SandboxState
from vmruntime.pods.context import Context, Live

log = structlog.get_logger(__name__)

RETRY_SECONDS = 0.2
DRAIN_SECONDS = 3.0
RECORD_SECONDS = 1.0
CAN_END = frozenset({ContainerState.CREATED, ContainerState.RUNNING, ContainerState.UNKNOWN})
VM_ENDED_EXIT_CODE = 255
"""What CRI runtimes report for a container whose end nobody saw."""


def watch(context: Context, sandbox_id: str, live: Live) -> None:
    """Begin to watch a sandbox."""
    live.scope.start(_watch_events(context, sandbox_id, live), "events")
    context.scope.start(_watch_end(context, sandbox_id, live), f"end of {sandbox_id[:13]}")


async def _watch_events(context: Context, sandbox_id: str, live: Live) -> None:
    ending: set[str] = set()
    while True:
        try:
            async for state in live.running.agent.events():
                if _is_news(context, sandbox_id, state) and state.id not in ending:
                    ending.add(state.id)
                    # Containers are independent: one that drains its output slowly must not delay another's end.
                    live.scope.start(_record_end(context, live, state, ending), f"end of {state.id[:13]}")
        except AgentError as error:
            log.debug("events interrupted", sandbox=sandbox_id, error=str(error))
        await asyncio.sleep(RETRY_SECONDS)


def _is_news(context: Context, sandbox_id: str, state: GuestContainerState) -> bool:
    """Whether a guest tells the end of a container of its own that was not known; it may say what it likes, and often."""
    if state.phase is not GuestPhase.EXITED:
        return False
    try:
        container = context.registry.container(state.id)
    except NotFound:
        return False
    return container.sandbox_id == sandbox_id and container.state in CAN_END | {ContainerState.CREATING}


async def _record_end(context: Context, live: Live, state: GuestContainerState, ending: set[str]) -> None:
    async def record() -> None:
        async with context.locks.hold(state.id):
            try:
                container = context.registry.container(state.id)
            except NotFound:
                return  # removed meanwhile
            await record_exit(context, container, state)

    try:
        if pump := live.pumps.get(state.id):
            await pump.wait_drained(DRAIN_SECONDS)
        await _until_recorded(record, container=state.id)
    finally:
        ending.discard(state.id)


async def _until_recorded(record: Callable[[], Awaitable[None]], **what: str) -> None:
    """Write down what is told only once, even if the store cannot take it now: its disk is full, say."""
    while True:
        try:
            return await record()
        except VmruntimeError as error:
            log.error("not written down, trying again", error=str(error), **what)
            await asyncio.sleep(RECORD_SECONDS)


async def now_or_later(context: Context, record: Callable[[], Awaitable[None]], **what: str) -> None:
    """Write something down now or, when the store does not take it, in the background: nobody else would do it."""
    try:
        await record()
    except VmruntimeError as error:
        log.error("not written down, trying again", error=str(error), **what)
        context.scope.start(_until_recorded(record, **what), "record")


async def record_exit(context: Context, container: Container, state: GuestContainerState) -> None:
    """Write down how a container ended; nothing when it is known already. Call it with the container's lock held."""
    if container.state not in CAN_END:
        return
    now = context.clock.now_ns()
    started = container.started_at or state.started_at
    await context.registry.change_container(
        container.id,
        state=ContainerState.EXITED,
        exit_code=state.exit_code,
        reason=exit_reason(state.exit_code, oom_killed=state.oom_killed),
        message=state.message,
        started_at=started,
        # The guest's clock is the guest's: an end before the start or in the future is not believed.
        finished_at=min(max(state.exited_at, started), now),
        pid=0,
    )
    if state.oom_killed:
        OOM_KILLS.inc()
    log.info("container exited", container=container.id, exit_code=state.exit_code, oom_killed=state.oom_killed)


def exit_reason(exit_code: int, *, oom_killed: bool) -> str:
    """Return the reason kubelet shows for an end."""
    if oom_killed:
        return "OOMKilled"
    return "Completed" if exit_code == 0 else "Error"


async def _watch_end(context: Context, sandbox_id: str, live: Live) -> None:
    """Wait until the VM is gone; if nobody asked for that, mark the sandbox and its containers as ended."""
    reason = await live.running.wait()
    async with context.locks.hold(sandbox_id):
        if context.live.get(sandbox_id) is not live:
            return  # stopped on request
        SANDBOX_DEATHS.inc()
        log.error("sandbox ended by itself", sandbox=sandbox_id, reason=reason)
        del context.live[sandbox_id]
    await live.scope.close()
    await live.running.close()

    async def record() -> None:
        async with context.locks.hold(sandbox_id):
            await mark_gone(context, sandbox_id, reason)

    await _until_recorded(record, sandbox=sandbox_id)


async def mark_gone(context: Context, sandbox_id: str, reason: str) -> None:
    """Record the end of a sandbox that does not run, and release its VM; its network stays until StopPodSandbox."""
    try:
        sandbox = context.registry.sandbox(sandbox_id)
    except NotFound:
        return  # removed meanwhile
    await end_containers(context, sandbox_id, reason)
    if sandbox.state is SandboxState.READY:
        await context.registry.change_sandbox(sandbox_id, state=SandboxState.NOTREADY, reason=reason)
    try:
        await context.releaser(sandbox).release(sandbox_id, final=False)
    except VmruntimeError as error:
        log.error("clean-up left something behind", sandbox=sandbox_id, error=str(error))


async def end_containers(context: Context, sandbox_id: str, reason: str) -> None:
    """Record that containers ended with their sandbox."""
    for container in context.registry.containers_of(sandbox_id):
        async with context.locks.hold(container.id):
            current = context.registry.container(container.id)
            if current.state in CAN_END:
                await context.registry.change_container(
                    container.id,
                    state=ContainerState.EXITED,
                    exit_code=VM_ENDED_EXIT_CODE,
                    reason="Error",
                    message=f"the pod's VM ended: {reason}",
                    finished_at=context.clock.now_ns(),
                    pid=0,
                )
