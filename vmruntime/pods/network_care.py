"""Looking after pods' networks: what nobody owns is released, what is not as it was made is told."""

from __future__ import annotations

import asyncio

import structlog

from vmruntime.errors import VmruntimeError
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.sandbox import SandboxState
from vmruntime.pods.context import Context

log = structlog.get_logger(__name__)

COLLECT_SECONDS = 30.0
"""Plugins that hang must not keep the daemon from starting."""

GOOD = "as it was made"
NOT_CHECKED = "not checked"


async def collect_networks(context: Context) -> None:
    """Release every network that belongs to no sandbox; before the first call is served, so that nothing is added."""
    keep = {resource.key for resource in await context.owned.ledger.all() if resource.kind is ResourceKind.NETWORK}
    try:
        async with asyncio.timeout(COLLECT_SECONDS):
            await context.network.collect(keep)
    except VmruntimeError as error:
        log.warning("networks nobody owns may be left", error=str(error))
    except TimeoutError:
        log.warning("networks nobody owns may be left", error=f"not done within {COLLECT_SECONDS:g} s")
    except Exception:  # a defect there must not keep the daemon from starting
        log.exception("networks nobody owns may be left")


async def check_networks(context: Context) -> None:
    """Say in the log which running pods' networks are not as they were made: after a restart, much may have happened.

    Such a pod goes on; CNI has no repair, and whoever runs it may know better than to lose it.
    """
    for sandbox in context.registry.sandboxes():
        if sandbox.state is SandboxState.READY:
            said = await check_network(context, sandbox.id)
            if said not in (GOOD, NOT_CHECKED):
                log.warning("a pod's network is not as it was made, says CHECK", sandbox=sandbox.id, why=said)


async def check_network(context: Context, sandbox_id: str) -> str:
    """Return how a sandbox's network is, in words: GOOD, NOT_CHECKED, or what is wrong.

    Not checked are pods without a network of their own, and networks without CHECK (before version 0.4.0, disableCheck).
    """
    try:
        return GOOD if await context.network.check(sandbox_id) else NOT_CHECKED
    except VmruntimeError as error:
        return str(error)
