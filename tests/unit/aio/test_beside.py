"""Work beside other work."""

from __future__ import annotations

import asyncio

import pytest

from vmruntime.aio.beside import together


async def test_a_failure_does_not_end_who_waits_next() -> None:
    """Time-outs of the task still run out as such."""

    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await together(fail())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.sleep(10)
