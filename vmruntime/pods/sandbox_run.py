"""RunPodSandbox: record, then network beside VM, then NIC and set-up; each step undone when a later one fails."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Sequence

import msgspec
import structlog

from vmruntime import tracing
from vmruntime.agent.interface import GuestSetup
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import AlreadyExists, FailedPrecondition, VmruntimeError
from vmruntime.metrics.instruments import observe_start
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import Dns, NamespaceMode, PodNetwork, Sandbox, SandboxKind, SandboxSpec, SandboxState
from vmruntime.network.tap import SpareTap
from vmruntime.pods.context import Context, Live
from vmruntime.pods.leftovers import release_or_retry
from vmruntime.pods.monitor import now_or_later, watch
from vmruntime.pods.ports import Tap
from vmruntime.pods.spans import note_pod
from vmruntime.pods.vm_end import vm_end_told
from vmruntime.sandboxes.interface import RunningSandbox

log = structlog.get_logger(__name__)

ENTROPY_BYTES = 64


async def run_sandbox(context: Context, spec: SandboxSpec) -> str:
    """Start a sandbox and return its id; see pods.interface.Pods.run_sandbox."""
    key = spec.metadata.key
    with contextlib.ExitStack() as stack:
        # A retry waits here until the first call is over, and may give up waiting.
        stack.callback(await context.locks.take(f"name {key}"))
        for other in context.registry.sandboxes(hidden=True):
            if other.spec.metadata.key == key:
                note_pod(other.id, other.spec)
                return _hand_over(context, other, spec)
        sandbox_id = context.id_for(spec)
        held = stack.pop_all()

        async def create() -> None:
            context.handover.add(sandbox_id)
            await _create(context, sandbox_id, spec)

        # The creation goes on if this caller goes away (kubelet's time-out); its retry is handed the result.
        note_pod(sandbox_id, spec)
        await context.shared.run(create, f"run {sandbox_id[:13]}", owning=held.close)
    context.handover.discard(sandbox_id)
    return sandbox_id


def _hand_over(context: Context, other: Sandbox, spec: SandboxSpec) -> str:
    if other.id in context.handover and other.state is SandboxState.READY and other.spec == spec:
        context.handover.discard(other.id)
        return other.id
    raise AlreadyExists(
        f"metadata: the sandbox name {spec.metadata.key} is taken by {other.id} ({other.state.value})",
        remedy="remove that sandbox, or use another attempt number",
    )


async def _create(context: Context, sandbox_id: str, spec: SandboxSpec) -> None:
    began = time.monotonic()
    sandbox = Sandbox(id=sandbox_id, spec=spec, state=SandboxState.CREATING, created_at=context.clock.now_ns())
    try:
        log.debug("sandbox being created", sandbox=sandbox_id, pod=spec.metadata.name)
        context.backend(sandbox).size(sandbox)  # refuse what cannot work before anything is made
        await context.registry.add_sandbox(sandbox)
        await _start(context, sandbox, began)
    except BaseException as error:
        context.handover.discard(sandbox_id)
        log.warning("sandbox not started", sandbox=sandbox_id, error=str(error))
        await asyncio.shield(_undo(context, sandbox))
        raise


async def _start(context: Context, sandbox: Sandbox, began: float) -> None:
    network, taps, running = await _network_beside_vm(context, sandbox)
    live = Live(running, TaskScope(f"sandbox {sandbox.id[:13]}"))
    context.live[sandbox.id] = live
    before_setup = time.monotonic()
    async with vm_end_told(running):
        try:
            await _attach_nics(network, taps, running)
        finally:
            for tap in taps:
                tap.close()
        _check_user_namespace(sandbox, running)
        with tracing.span("sandbox.setup"):
            await running.agent.setup(guest_setup(context, sandbox, network, running))
    now = time.monotonic()
    phases = running.phases | {"setup": (now - before_setup) * 1000, "total": (now - began) * 1000}
    await context.registry.change_sandbox(
        sandbox.id,
        state=SandboxState.READY,
        network=network,
        kernel=running.hello.kernel,
        phases=phases,
        source=running.source,
    )
    watch(context, sandbox.id, live)
    observe_start(phases, running.source)
    log.info(
        "sandbox ready",
        sandbox=sandbox.id,
        pod=sandbox.spec.metadata.name,
        source=running.source,
        milliseconds=round(phases["total"]),
    )


async def _attach_nics(network: PodNetwork, taps: Sequence[Tap], running: RunningSandbox) -> None:
    """Plug in the NICs that the sandbox does not have yet: the first one it may have got with its VM."""
    missing = [nic for nic in network.interfaces if not nic.device_mac] if taps else []
    for nic, tap in zip(missing, taps, strict=True):
        with tracing.span("sandbox.nic"):
            await running.attach_nic(nic, tap.fd)


def _check_user_namespace(sandbox: Sandbox, running: RunningSandbox) -> None:
    if sandbox.spec.namespaces.user_namespace is not None and not running.hello.user_namespaces:
        raise FailedPrecondition(
            "config.linux.security_context.namespace_options.userns_options.mode: POD, but the kernel"
            f" {running.hello.kernel}, on which the pod's containers run, cannot give them a user namespace",
            remedy="build the guest anew (make guest); host pods need Linux 5.19 and user.max_user_namespaces above 0",
        )


async def _network_beside_vm(context: Context, sandbox: Sandbox) -> tuple[PodNetwork, list[Tap], RunningSandbox]:
    """Run CNI while the VM boots; when one fails the other is cancelled and both clean up after themselves.

    A host pod's agent is started in the pod's network namespace, so that comes first; an image pod has no VM yet.
    """
    if sandbox.spec.kind is not SandboxKind.CONTAINER:
        return await _network_then_agent(context, sandbox)
    taps: list[Tap] = []
    spare = await context.spares.tap(sandbox.id) if context.spares is not None else None

    async def network() -> PodNetwork:
        began = time.monotonic()
        pod_network, opened = await _add_network(context, sandbox, spare)
        taps.extend(opened)
        spent["cni"] = (time.monotonic() - began) * 1000
        return pod_network

    spent: dict[str, float] = {}
    running: RunningSandbox | None = None

    async def machine() -> RunningSandbox:
        nonlocal running
        with tracing.span("sandbox.boot"):
            running = await context.backend(sandbox).start(sandbox)
        return running

    try:
        async with asyncio.TaskGroup() as group:
            adding = group.create_task(network())
            starting = group.create_task(machine())
    except BaseException as errors:
        for tap in taps:
            tap.close()
        if running is not None:
            await running.close()
        if isinstance(errors, BaseExceptionGroup):
            raise _first(errors) from None
        raise
    finally:
        if spare is not None:
            spare.close()
    starting.result().phases.update(spent)
    return adding.result(), taps, starting.result()


async def _network_then_agent(context: Context, sandbox: Sandbox) -> tuple[PodNetwork, list[Tap], RunningSandbox]:
    network = PodNetwork(netns="")
    if sandbox.spec.namespaces.network is not NamespaceMode.NODE:
        network, _ = await _add_network(context, sandbox)
        sandbox = msgspec.structs.replace(sandbox, network=network)
    with tracing.span("sandbox.boot"):
        return network, [], await context.backend(sandbox).start(sandbox)


async def _add_network(
    context: Context, sandbox: Sandbox, spare: SpareTap | None = None
) -> tuple[PodNetwork, Sequence[Tap]]:
    with tracing.span("sandbox.network"):
        await context.owned.ledger.record(Resource(owner=sandbox.id, kind=ResourceKind.NETWORK, key=sandbox.id))
        return await context.network.add(sandbox, spare)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the failure that came first and means something to a caller."""
    known, _ = errors.split(VmruntimeError)
    chosen = (known or errors).exceptions[0]
    return _first(chosen) if isinstance(chosen, BaseExceptionGroup) else chosen


def guest_setup(context: Context, sandbox: Sandbox, network: PodNetwork, running: RunningSandbox) -> GuestSetup:
    """Return what the agent needs to make a booted guest this sandbox."""
    spec = sandbox.spec
    given = spec.dns
    dns = Dns(
        servers=given.servers or network.dns.servers,
        searches=given.searches or network.dns.searches,
        options=given.options or network.dns.options,
    )
    return GuestSetup(
        sandbox_id=sandbox.id,
        hostname=spec.hostname or spec.metadata.name[:63],
        time_ns=context.clock.now_ns(),
        entropy=os.urandom(ENTROPY_BYTES),
        interfaces=network.interfaces,
        routes=network.routes,
        dns=dns,
        sysctls=spec.sysctls,
        scratch_serial=running.scratch_serial,
        shared_pid_namespace=spec.namespaces.pid is NamespaceMode.POD,
        host_ipc=spec.namespaces.ipc is NamespaceMode.NODE,
        user=spec.namespaces.user_namespace,
    )


async def _undo(context: Context, sandbox: Sandbox) -> None:
    """Leave nothing of a sandbox that did not start."""
    live = context.live.pop(sandbox.id, None)
    if live is not None:
        try:
            await live.scope.close()
            await live.running.close()
        except Exception:  # whatever it is, the rest must go and the name be free again
            log.exception("clean-up left something behind", sandbox=sandbox.id)
    if context.spares is not None:
        await context.spares.drop(sandbox.id)
    await release_or_retry(context, sandbox.id)
    drop = functools.partial(context.registry.drop_sandbox, sandbox.id)
    await now_or_later(context, drop, sandbox=sandbox.id)
