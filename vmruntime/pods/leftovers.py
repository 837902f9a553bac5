"""What could not be released when its owner ended: a CNI plugin that fails at DEL, a disk that hangs.

kubelet repeats a stop or remove that failed. But nobody knows the id of a sandbox that did not start, so the daemon itself
goes on trying, and a restarted one takes over from the ledger.
"""

from __future__ import annotations

import asyncio

import structlog

from vmruntime.errors import VmruntimeError
from vmruntime.metrics.instruments import RELEASE_FAILURES
from vmruntime.pods.context import Context

log = structlog.get_logger(__name__)

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 60.0


async def release_or_retry(context: Context, owner: str) -> None:
    """Release everything an owner has, now or, when that fails, again and again in the background."""
    if not await _released(context, owner):
        context.scope.start(_retry(context, owner), f"release {owner[:13]}")


async def _retry(context: Context, owner: str) -> None:
    delay = FIRST_SECONDS
    while True:
        await asyncio.sleep(delay)
        if await _released(context, owner):
            log.info("released what was left behind", owner=owner)
            return
        delay = min(2 * delay, LONGEST_SECONDS)


async def _released(context: Context, owner: str) -> bool:
    try:
        await context.owned.release(owner)
    except VmruntimeError as error:
        RELEASE_FAILURES.inc()
        log.error("clean-up left something behind, trying again", owner=owner, error=str(error))
        return False
    except Exception:  # a defect: what remains is in the ledger all the same
        RELEASE_FAILURES.inc()
        log.exception("clean-up left something behind, trying again", owner=owner)
        return False
    return True
