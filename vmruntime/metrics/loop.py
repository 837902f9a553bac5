"""How late the event loop is: while something blocks it, nothing else of the daemon moves."""

from __future__ import annotations

import asyncio

from vmruntime.metrics.instruments import LOOP_LAG

INTERVAL = 0.025
"""Seconds between two looks: a stall shorter than that may fall between them; 40 looks a second cost next to nothing."""


async def measure_lag() -> None:
    """Look, for ever, how much later than asked for a task comes to its turn."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL
        await asyncio.sleep(INTERVAL)
        LOOP_LAG.observe(max(0.0, loop.time() - due))
