"""Removes images that nobody has used for long, where the settings say after how many days."""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

from vmruntime.errors import VmruntimeError
from vmruntime.model.image import Pruned

log = structlog.get_logger(__name__)

DAY = 24 * 3600.0
LONGEST_PAUSE = 3600.0


class Prunable(Protocol):
    """What is cleaned up."""

    async def prune(self, unused_seconds: float) -> Pruned:
        """Remove what nobody has used for so long."""


async def prune_old(images: Prunable, days: float) -> None:
    """Look for old images at once and then every hour, or more often where they get old sooner."""
    age = days * DAY
    while True:
        try:
            await images.prune(age)
        except VmruntimeError as error:
            log.error("unused images not removed, trying again", error=str(error))
        await asyncio.sleep(min(LONGEST_PAUSE, age / 4))
