"""Faults on order, for the fakes: a fake announces each of its steps here, and a test says what happens then.

    faults.fail("agent.create", AgentGone("…"))      the step fails, the next time it is reached
    faults.hold("agent.setup")                       it waits until the test lets it go on
    faults.delay("vm.start", 0.5)                    it takes half a second
    faults.run("agent.start", guest.die)             something happens just before it
    faults.lie("agent.delete", ["not-yours"])        it answers this instead of the truth

Steps are named "part.verb", and "part.verb done" when the work is over but the caller has not been told: an error there
is an answer that got lost. EVERY_STEP with `skip=n` stands for the step that is reached after n others, so a test can
break each step of a use case in turn.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")

EVERY_STEP = "*"


class Hold:
    """A step that waits."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._go_on = asyncio.Event()

    def release(self) -> None:
        """Let the step go on."""
        self._go_on.set()

    async def wait(self) -> None:
        """Say that the step is reached, and wait for release()."""
        self.reached.set()
        await self._go_on.wait()


@dataclasses.dataclass
class _Order:
    step: str
    skip: int
    times: int
    action: Callable[[], Awaitable[None]]

    def due(self, step: str) -> bool:
        """Whether the order is for this visit of this step; counts down."""
        if self.step not in (step, EVERY_STEP) or self.times == 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class Faults:
    """What goes wrong. Every order is for one visit of its step unless `times` says otherwise (-1: always).

    Attributes:
        steps: The steps reached so far, in order.
    """

    def __init__(self) -> None:
        self.steps: list[str] = []
        self._orders: list[_Order] = []
        self._lies: dict[str, list[Any]] = {}

    def fail(self, step: str, error: BaseException, *, skip: int = 0, times: int = 1) -> None:
        """Make a step raise."""

        async def action() -> None:
            raise error

        self._orders.append(_Order(step, skip, times, action))

    def hold(self, step: str, *, skip: int = 0) -> Hold:
        """Make a step wait until the value's release() is called."""
        hold = Hold()
        self._orders.append(_Order(step, skip, 1, hold.wait))
        return hold

    def delay(self, step: str, seconds: float, *, skip: int = 0, times: int = 1) -> None:
        """Make a step late."""
        self._orders.append(_Order(step, skip, times, lambda: asyncio.sleep(seconds)))

    def run(self, step: str, action: Callable[[], Awaitable[None]], *, skip: int = 0) -> None:
        """Make something else happen just before a step."""
        self._orders.append(_Order(step, skip, 1, action))

    def lie(self, step: str, value: Any) -> None:
        """Make a step's next answer this one."""
        self._lies.setdefault(step, []).append(value)

    async def at(self, step: str) -> None:
        """Announce a step; what was ordered for it happens here."""
        self.steps.append(step)
        due = [order for order in self._orders if order.due(step)]
        for order in due:
            await order.action()

    def answer(self, step: str, truth: T) -> T:
        """Return the truth, or the lie that was ordered for the step."""
        lies = self._lies.get(step)
        if not lies:
            return truth
        value: T = lies.pop(0)
        return value
