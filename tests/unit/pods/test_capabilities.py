"""Which capabilities a container gets."""

from __future__ import annotations

import pytest

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.model.container import SecurityContext
from vmruntime.pods.oci.capabilities import ALL, DEFAULT, bounding, capability_sets, of_this_process

LACKING = tuple(name for name in ALL if name != "CAP_SYS_RESOURCE")


def test_everything_is_what_there_is() -> None:
    privileged, everything = SecurityContext(privileged=True), SecurityContext(add_capabilities=["ALL"])
    assert bounding(privileged) == bounding(everything) == list(ALL)
    assert bounding(privileged, LACKING) == bounding(everything, LACKING) == list(LACKING)
    assert bounding(SecurityContext(), LACKING) == [name for name in ALL if name in DEFAULT]


def test_what_is_named_must_be_there() -> None:
    with pytest.raises(FailedPrecondition, match="CAP_SYS_RESOURCE cannot be given.*start the daemon with it"):
        bounding(SecurityContext(add_capabilities=["ALL", "SYS_RESOURCE"]), LACKING)
    with pytest.raises(InvalidArgument, match="'NONSENSE'"):
        bounding(SecurityContext(drop_capabilities=["NONSENSE"]), LACKING)
    # What is dropped again is not missed.
    both = SecurityContext(add_capabilities=["SYS_RESOURCE"], drop_capabilities=["cap_sys_resource"])
    assert bounding(both, LACKING) == bounding(SecurityContext())


def test_single_names_win_over_all() -> None:
    security = SecurityContext(drop_capabilities=["ALL"], add_capabilities=["chown"], add_ambient_capabilities=["KILL"])
    sets = capability_sets(security)
    assert sets["bounding"] == sets["effective"] == ["CAP_CHOWN", "CAP_KILL"]
    assert sets["ambient"] == sets["inheritable"] == ["CAP_KILL"]


def test_this_process_has_some_of_them() -> None:
    assert set(of_this_process()) <= set(ALL)
