"""What a guest says of where its time went: only looked at, and within bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmruntime.agent import checks
from vmruntime.generated import agent_pb2

Phase = agent_pb2.Phase


def test_phases_follow_each_other_unless_they_say_when_they_began() -> None:
    told = [
        Phase(name="machine", duration_us=1000),
        Phase(name="scratch", duration_us=3000, start_us=2000),
        Phase(name="network", duration_us=1000, start_us=2000),
        Phase(name="sysctls", duration_us=500),
    ]
    assert checks.phases(told) == [
        ("guest.machine", 0.0, 0.001),
        ("guest.scratch", 0.002, 0.003),
        ("guest.network", 0.002, 0.001),
        ("guest.sysctls", 0.003, 0.0005),
    ]


phases = st.builds(
    Phase, name=st.text(max_size=100), duration_us=st.integers(0, 2**64 - 1), start_us=st.integers(0, 2**64 - 1)
)


@given(st.lists(phases, max_size=2 * checks.PHASES_LIMIT))
def test_whatever_a_guest_says_stays_within_bounds(told: list[Phase]) -> None:
    found = checks.phases(told)
    assert len(found) == min(len(told), checks.PHASES_LIMIT)
    for name, start, duration in found:
        assert name.startswith("guest.")
        assert name.isprintable()
        assert len(name) <= len("guest.") + checks.PHASE_NAME_LIMIT
        assert 0 <= duration <= checks.PHASE_SECONDS
        assert 0 <= start <= checks.PHASES_LIMIT * 2 * checks.PHASE_SECONDS
