"""What a daemon does first: it makes the store and reality agree.

Assumptions: no other daemon owns these directories (a lock says so); pids are known together with their start time, so
another program is never taken for a VM; everything vmruntime made is in the ledger, because it was recorded first.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import GuestContainerState, GuestPhase
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import NotFound, VmruntimeError
from vmruntime.hypervisor.errors import VmHeld
from vmruntime.metrics.instruments import LEAKS, RECOVERED
from vmruntime.model.container import Container, ContainerState
from vmruntime.model.image import layer_serial
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.sandbox import Sandbox, SandboxState
from vmruntime.pods.container_remove import delete_in_guest, forget_container
from vmruntime.pods.context import Context, Live
from vmruntime.pods.leftovers import release_or_retry
from vmruntime.pods.log_pump import LogPump
from vmruntime.pods.monitor import (
    CAN_END,
    DRAIN_SECONDS,
    VM_ENDED_EXIT_CODE,
    mark_gone,
    now_or_later,
    record_exit,
    watch,
)
from vmruntime.pods.network_care import check_networks, collect_networks
from vmruntime.sandboxes.interface import RunningSandbox

log = structlog.get_logger(__name__)

AT_ONCE = 16
STATES_ATTEMPTS = 5
STATES_SECONDS = 0.5
ADOPT_SECONDS = 30.0
"""What taking over one sandbox may take; kubelet waits for all of them."""
HELD_SECONDS = 5.0
"""After which a guest that did not run is tried again."""

MOST_STRANGERS = 8


async def recover(context: Context) -> None:
    """Adopt what lives, mark what died, finish what was begun, release what nobody owns."""
    await context.registry.load()
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(sandbox: Sandbox) -> None:
        async with turn:
            try:
                await _recover_sandbox(context, sandbox)
            except Exception:  # whatever it is, one pod must not keep the daemon from starting
                log.exception("sandbox not recovered", sandbox=sandbox.id)

    async with asyncio.TaskGroup() as group:
        for sandbox in context.registry.sandboxes(hidden=True):
            group.create_task(one(sandbox))
    await _release_ownerless(context)
    await collect_networks(context)
    context.scope.start(check_networks(context), "check of networks")
    await context.images.sweep()


async def _recover_sandbox(context: Context, sandbox: Sandbox) -> None:
    if sandbox.state in (SandboxState.CREATING, SandboxState.REMOVING):
        log.info("finishing what an earlier daemon left", sandbox=sandbox.id, state=sandbox.state.value)
        if sandbox.state is SandboxState.CREATING:
            await release_or_retry(context, sandbox.id)
        else:
            await context.owned.release(sandbox.id)  # a failure keeps the sandbox: kubelet repeats its removal
        for container in context.registry.containers_of(sandbox.id, hidden=True):
            await forget_container(context, container)
        await context.registry.drop_sandbox(sandbox.id)
    elif sandbox.state is SandboxState.READY:
        await _adopt(context, sandbox)
    else:
        # Its stop may have been cut short.
        await _drop_unfinished(context, sandbox.id)
        await mark_gone(context, sandbox.id, sandbox.reason)


async def _adopt(context: Context, sandbox: Sandbox) -> None:
    try:
        async with asyncio.timeout(ADOPT_SECONDS):
            await _take_over(context, sandbox)
    except VmHeld as error:
        _try_later(context, sandbox.id, error.why)
        return
    except VmruntimeError as error:
        await _give_up(context, sandbox, error.message)
    except TimeoutError:
        await _give_up(context, sandbox, f"it could not be taken over within {ADOPT_SECONDS:g} s")
    except Exception as error:
        log.exception("sandbox cannot be taken over", sandbox=sandbox.id)
        await _give_up(context, sandbox, f"it could not be taken over: {error!r}")
    context.held.pop(sandbox.id, None)


def _try_later(context: Context, sandbox_id: str, why: str) -> None:
    """A sandbox whose guest does not run for the time being is no sandbox that is gone."""
    log.warning("sandbox cannot be taken over yet", sandbox=sandbox_id, reason=why)
    context.held[sandbox_id] = why
    context.scope.start(_take_over_later(context, sandbox_id), f"held {sandbox_id[:13]}")


async def _take_over_later(context: Context, sandbox_id: str) -> None:
    await asyncio.sleep(HELD_SECONDS)
    async with context.locks.hold(sandbox_id):
        with contextlib.suppress(NotFound):
            sandbox = context.registry.sandbox(sandbox_id)
            if sandbox.state is SandboxState.READY:
                await _adopt(context, sandbox)
                return
        del context.held[sandbox_id]  # stopped or removed meanwhile


async def _take_over(context: Context, sandbox: Sandbox) -> None:
    running = await context.backend(sandbox).adopt(sandbox)
    live = Live(running, TaskScope(f"sandbox {sandbox.id[:13]}"))
    context.live[sandbox.id] = live
    try:
        states = await _states(running)
        await _recover_containers(context, sandbox.id, live, states)
    except BaseException:
        held = running.held
        del context.live[sandbox.id]
        await live.scope.close()
        await running.close()
        if held:
            raise VmHeld(held) from None
        raise
    watch(context, sandbox.id, live)
    known = {container.id for container in context.registry.containers_of(sandbox.id, hidden=True)}
    if strangers := sorted(states.keys() - known):
        live.scope.start(_delete_strangers(context, sandbox.id, live, strangers), "containers no one knows")
    RECOVERED.labels("adopted").inc()
    log.info("sandbox adopted", sandbox=sandbox.id)


async def _give_up(context: Context, sandbox: Sandbox, reason: str) -> None:
    """A sandbox is gone, or there but of no use: one that does not answer is ended, so that kubelet makes the pod anew."""
    RECOVERED.labels("gone").inc()
    log.warning("sandbox cannot be taken over", sandbox=sandbox.id, reason=reason)

    async def record() -> None:
        await _drop_unfinished(context, sandbox.id)
        await mark_gone(context, sandbox.id, reason)

    await now_or_later(context, record, sandbox=sandbox.id)


async def _states(running: RunningSandbox) -> dict[str, GuestContainerState]:
    """Return the guest's containers by id; a guest may be busy for a moment."""
    for _ in range(STATES_ATTEMPTS - 1):
        try:
            return {state.id: state for state in await running.agent.containers()}
        except AgentError as error:
            log.info("agent does not tell its containers, asking again", error=str(error))
            await asyncio.sleep(STATES_SECONDS)
    return {state.id: state for state in await running.agent.containers()}


async def _recover_containers(
    context: Context, sandbox_id: str, live: Live, in_guest: dict[str, GuestContainerState]
) -> None:
    """Bring the records of a sandbox's containers up to date; each has its own output to wait for."""

    async def one(container: Container) -> None:
        try:
            await _recover_container(context, live, container, in_guest.get(container.id))
        except Exception:
            log.exception("container not recovered", container=container.id)

    async with asyncio.TaskGroup() as group:
        for container in context.registry.containers_of(sandbox_id, hidden=True):
            group.create_task(one(container))


async def _delete_strangers(context: Context, sandbox_id: str, live: Live, strangers: list[str]) -> None:
    """Delete containers that only the guest knows; it may have invented them, so neither all nor before the start."""
    log.warning("deleting containers no one knows", sandbox=sandbox_id, count=len(strangers), most=MOST_STRANGERS)
    for stranger in strangers[:MOST_STRANGERS]:
        try:
            released = await live.running.agent.delete(stranger)
            known = context.registry.containers_of(sandbox_id, hidden=True)
            used = {layer_serial(layer) for container in known for layer in container.layers}
            await live.running.release_layers([serial for serial in released if serial not in used])
        except VmruntimeError as error:
            log.error("clean-up left something behind", container=stranger, error=str(error))


async def _recover_container(
    context: Context, live: Live, container: Container, state: GuestContainerState | None
) -> None:
    if container.state in (ContainerState.CREATING, ContainerState.REMOVING):
        await delete_in_guest(context, container, again=True)
        await forget_container(context, container)
    elif state is not None:
        await _resume(context, live, container, state)
    elif container.state in (ContainerState.CREATED, ContainerState.RUNNING) and not container.message:
        await _lost(context, container)


async def _resume(context: Context, live: Live, container: Container, state: GuestContainerState) -> None:
    """Go on with a container's log, and learn what it did meanwhile."""
    live.pumps[container.id] = pump = await _reopened(context, live, container)
    live.scope.start(pump.run(), f"log of {container.id[:13]}")
    if state.phase is GuestPhase.RUNNING and container.state is ContainerState.CREATED:
        await context.registry.change_container(container.id, state=ContainerState.RUNNING, started_at=state.started_at)
    elif state.phase is GuestPhase.EXITED and container.state in CAN_END:
        await pump.wait_drained(DRAIN_SECONDS)
        await record_exit(context, container, state)


async def _reopened(context: Context, live: Live, container: Container) -> LogPump:
    """Return a pump for a container's log; for one that cannot be written any more, one that lets the output go.

    Output that nobody reads would make the container wait for ever.
    """
    agent, position = live.running.agent, context.log_position(container.id)
    pump = LogPump(agent, container.id, container.spec.log_path, position)
    try:
        await pump.open()
    except VmruntimeError as error:
        log.error("log cannot be gone on with", container=container.id, error=str(error))
        pump = LogPump(agent, container.id, "", position)
        await pump.open()
    return pump


async def _lost(context: Context, container: Container) -> None:
    await context.registry.change_container(
        container.id,
        state=ContainerState.EXITED,
        exit_code=VM_ENDED_EXIT_CODE,
        reason="Error",
        message="the container's end was not seen: its agent does not know it any more",
        finished_at=context.clock.now_ns(),
    )


async def _drop_unfinished(context: Context, sandbox_id: str) -> None:
    """Forget containers that were being created or removed in a sandbox that runs no more."""
    for container in context.registry.containers_of(sandbox_id, hidden=True):
        if container.state in (ContainerState.CREATING, ContainerState.REMOVING):
            await forget_container(context, container)


async def _release_ownerless(context: Context) -> None:
    known = {sandbox.id for sandbox in context.registry.sandboxes(hidden=True)}
    resources = await context.owned.ledger.all()
    spares = {resource.owner for resource in resources if resource.kind is ResourceKind.SPARE}
    for owner in {resource.owner for resource in resources} - known - {""}:
        if owner in spares:
            log.info("ending a VM that waited for a pod under an earlier daemon", owner=owner)
        else:
            log.warning("releasing what nobody owns", owner=owner)
            LEAKS.inc()
        await release_or_retry(context, owner)
