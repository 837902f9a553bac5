"""Finding what an id in a request stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vmruntime.cri.translate.checks import required
from vmruntime.errors import InvalidArgument
from vmruntime.ids import short_id

_FULL_LENGTH = 64


def full_id(field: str, given: str, known: Callable[[], Iterable[str]]) -> str:
    """Return the full id. kubelet sends full ids; people give crictl the first digits, as every runtime lets them.

    Args:
        field: Name of the request's field.
        given: Its value.
        known: All ids; asked only for short ones.

    Returns:
        The only id that starts with `given`, or `given` itself when there is none: whether an unknown id is an
        error is for the called use case to say.

    Raises:
        InvalidArgument: It is empty, cannot be an id, or several ids start with it.
    """
    required(field, given)
    if len(given) >= _FULL_LENGTH:
        return given
    found = [one for one in known() if one.startswith(given)]
    if given in found or not found:
        return given
    if len(found) > 1:
        names = ", ".join(sorted(short_id(one) for one in found)[:4])
        raise InvalidArgument(f"{field}: {given!r} is the start of several ids: {names}", remedy="give more digits")
    return found[0]
