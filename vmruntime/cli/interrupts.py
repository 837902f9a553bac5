"""Ctrl-C and SIGTERM during work that must not be dropped halfway."""

from __future__ import annotations

import signal
import types
from typing import Self


class Interrupted(Exception):
    """Raised by Interrupts.check() after a signal came.

    Attributes:
        signum: Which.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupts:
    """Counts SIGINT, SIGTERM and SIGHUP instead of dying of them, while entered.

    The signals are looked at where it suits: a pod that is half made has to be finished before it can be removed.
    The third signal, and any after it, raises KeyboardInterrupt where it strikes: the daemon may hang.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    _PATIENCE = 3

    def __init__(self) -> None:
        self.count = 0
        self.signum = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for signum in self._SIGNALS:
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise Interrupted once a signal came."""
        if self.count:
            raise Interrupted(self.signum)

    def _note(self, signum: int, frame: types.FrameType | None) -> None:
        self.count += 1
        self.signum = signum
        if self.count >= self._PATIENCE:
            raise KeyboardInterrupt
