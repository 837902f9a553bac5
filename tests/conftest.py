"""What every test stands on."""

from __future__ import annotations

import signal
from typing import Any

import pytest

# A shell starts what runs in the background with SIGINT ignored, and programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What ends a run from outside, such as timeout(1), lets fixtures take away what they made.
def _interrupted(number: int, frame: Any) -> None:
    pytest.exit("SIGTERM", returncode=128 + number)


signal.signal(signal.SIGTERM, _interrupted)
