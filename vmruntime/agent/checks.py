"""Typed getters at an untrusted boundary: what a guest says is believed only within these limits."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from vmruntime.agent.errors import AgentLied
from vmruntime.agent.interface import RECORD_LIMIT, GuestContainerState, GuestPhase
from vmruntime.generated import agent_pb2
from vmruntime.model.output import OutputRecord

TEXT_LIMIT = 4096
NS_LIMIT = 1 << 63
PHASES_LIMIT = 32
PHASE_NAME_LIMIT = 32
PHASE_SECONDS = 3600.0


def text(value: str, what: str, limit: int = TEXT_LIMIT) -> str:
    """Return a short printable text, or raise AgentLied."""
    if len(value) > limit or not value.isprintable():
        raise AgentLied(f"{what} is not a printable text of at most {limit} characters")
    return value


def shown(value: str) -> str:
    """Return a text made fit to be shown: printable, and cut to TEXT_LIMIT characters."""
    return "".join(c if c.isprintable() else " " for c in value[:TEXT_LIMIT])


def number(value: int, what: str, low: int, high: int) -> int:
    """Return a number within limits, or raise AgentLied."""
    if not low <= value <= high:
        raise AgentLied(f"{what} is {value}, not within {low} and {high}")
    return value


def phases(messages: Iterable[agent_pb2.Phase]) -> list[tuple[str, float, float]]:
    """Return name, beginning and duration (in seconds) of the parts of a request, as the agent has measured them.

    They are only looked at: what is out of bounds is cut, and not worth failing for.
    """
    found: list[tuple[str, float, float]] = []
    before = 0.0
    for one in islice(messages, PHASES_LIMIT):
        start = min(one.start_us / 1e6, PHASE_SECONDS) or before
        duration = min(one.duration_us / 1e6, PHASE_SECONDS)
        found.append((f"guest.{shown(one.name[:PHASE_NAME_LIMIT])}", start, duration))
        before = start + duration
    return found


def container_state(message: agent_pb2.ContainerState) -> GuestContainerState:
    """Return a container's state, or raise AgentLied."""
    try:
        phase = GuestPhase(message.phase)
    except ValueError:
        raise AgentLied(f"a container's phase is {message.phase}") from None
    return GuestContainerState(
        id=text(message.id, "a container's id", 128),
        phase=phase,
        pid=number(message.pid, "a pid", 0, 1 << 22),
        started_at=number(message.started_at_unix_ns, "a start time", 0, NS_LIMIT),
        exited_at=number(message.exited_at_unix_ns, "an end time", 0, NS_LIMIT),
        exit_code=number(message.exit_code, "an exit code", 0, 255),
        oom_killed=message.oom_killed,
    )


def output_record(message: agent_pb2.OutputRecord, expected_seq: int) -> OutputRecord:
    """Return an output record, or raise AgentLied when it is out of order, too large or would forge a log line."""
    if message.seq != expected_seq:
        raise AgentLied(f"an output record has number {message.seq}, not {expected_seq}")
    if len(message.data) > RECORD_LIMIT or b"\n" in message.data:
        raise AgentLied("an output record is too long or has a newline")
    if message.stream not in (agent_pb2.OutputRecord.STDOUT, agent_pb2.OutputRecord.STDERR):
        raise AgentLied(f"an output record is of stream {message.stream}")
    return OutputRecord(
        message.seq,
        message.stream == agent_pb2.OutputRecord.STDERR,
        number(message.time_unix_ns, "a record's time", 0, NS_LIMIT),
        message.partial,
        message.data,
    )
