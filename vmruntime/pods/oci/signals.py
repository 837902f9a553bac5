"""Signal names and numbers, as images and CRI write them.

The table is Linux's for x86-64 and arm64 (signal(7)): the guest's numbers, whatever this host's Python knows.
"""

from __future__ import annotations

import re

from vmruntime.errors import InvalidArgument
from vmruntime.model.container import ContainerSpec
from vmruntime.model.image import ImageConfig

_NAMES = """
    HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU URG XCPU
    XFSZ VTALRM PROF WINCH IO PWR SYS
"""
_ORDERED = tuple(_NAMES.split())
_NUMBERS = {name: number for number, name in enumerate(_ORDERED, start=1)}
_NUMBERS |= {"CLD": _NUMBERS["CHLD"], "IOT": _NUMBERS["ABRT"], "POLL": _NUMBERS["IO"]}
# The real-time range C programs see; the first two of the kernel's belong to the C library (signal(7)).
_RTMIN, _RTMAX = 34, 64
_REALTIME = re.compile(r"RT(MIN(?P<plus>\+\d{1,2})?|MAX(?P<minus>-\d{1,2})?)")


def signal_number(text: str) -> int:
    """Return the number of a signal given as SIGTERM, TERM, SIGRTMIN+3 or 15.

    Raises:
        InvalidArgument: There is no such signal.
    """
    if text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= _RTMAX:
        return int(text)
    name = text.upper().removeprefix("SIG")
    if name in _NUMBERS:
        return _NUMBERS[name]
    if found := _REALTIME.fullmatch(name):
        base = _RTMIN if name.startswith("RTMIN") else _RTMAX
        number = base + int(found["plus"] or found["minus"] or 0)
        if _RTMIN <= number <= _RTMAX:
            return number
    raise InvalidArgument(f"stop signal: {text[:64]!r} is not a Linux signal")


def signal_name(number: int) -> str:
    """Return the name of a signal, SIGTERM or SIGRTMIN+3; empty when there is none of that number."""
    if 1 <= number <= len(_ORDERED):
        return f"SIG{_ORDERED[number - 1]}"
    if number == _RTMIN:
        return "SIGRTMIN"
    if number == _RTMAX:
        return "SIGRTMAX"
    # bash and CRI both count from the nearer end: SIGRTMIN+15 is followed by SIGRTMAX-14.
    if _RTMIN < number <= _RTMIN + 15:
        return f"SIGRTMIN+{number - _RTMIN}"
    if _RTMIN + 15 < number < _RTMAX:
        return f"SIGRTMAX-{_RTMAX - number}"
    return ""


def stop_signal(container: ContainerSpec, image: ImageConfig) -> int:
    """Return the signal StopContainer sends first: the container's, else the image's, else SIGTERM.

    Raises:
        InvalidArgument: There is no such signal.
    """
    return signal_number(container.stop_signal or image.stop_signal or "SIGTERM")
