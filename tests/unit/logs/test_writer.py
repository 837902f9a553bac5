"""The log file holds every record once, wherever the daemon is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmruntime.errors import FailedPrecondition
from vmruntime.logs.format import render
from vmruntime.logs.writer import LogWriter
from vmruntime.model.output import OutputRecord


def record(seq: int, text: bytes = b"hello", *, stderr: bool = False, partial: bool = False) -> OutputRecord:
    return OutputRecord(seq, stderr, 1_700_000_000_123_456_789 + seq, partial, text)


def test_render_is_the_cri_format() -> None:
    line = render(OutputRecord(1, True, 1_700_000_000_000_000_042, True, b"part"))
    assert line == b"2023-11-14T22:13:20.000000042Z stderr P part\n"


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    noted=st.integers(0, 12),
    torn=st.integers(0, 400),
)
@settings(max_examples=200, deadline=None)
def test_killed_anywhere_nothing_is_lost_or_doubled(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], noted: int, torn: int
) -> None:
    """A daemon that noted `noted` records and wrote `torn` bytes more is followed by one that reads on."""
    directory = tmp_path_factory.mktemp("log")
    records = [record(n + 1, b"x" * length) for n, length in enumerate(lengths)]
    noted = min(noted, len(records))
    whole = b"".join(render(r) for r in records)
    path, position = directory / "0.log", directory / "position"
    first = LogWriter(path, position)
    first.open()
    first.write(records[:noted])
    first.close()
    done = path.stat().st_size
    with path.open("ab") as file:
        file.write(whole[done : done + torn])

    second = LogWriter(path, position)
    second.open()
    assert second.seq == noted
    for one in records[second.seq :]:
        second.write([one])
    second.close()
    assert path.read_bytes() == whole


def test_rotation_goes_on_in_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    writer = LogWriter(path, tmp_path / "position")
    writer.open()
    writer.write([record(1)])
    path.rename(tmp_path / "0.log.20260101")
    writer.write([record(2)])
    writer.reopen()
    writer.write([record(3)])
    writer.close()
    assert (tmp_path / "0.log.20260101").read_bytes() == render(record(1)) + render(record(2))
    assert path.read_bytes() == render(record(3))


def test_line_torn_before_a_rotation_is_finished_in_the_old_file(tmp_path: Path) -> None:
    path, position = tmp_path / "0.log", tmp_path / "position"
    first = LogWriter(path, position)
    first.open()
    first.write([record(1)])
    first.close()
    with path.open("ab") as file:
        file.write(render(record(2))[:10])
    path.rename(tmp_path / "0.log.1")

    second = LogWriter(path, position)
    second.open()
    second.write([record(2), record(3)])
    second.close()
    assert (tmp_path / "0.log.1").read_bytes() == render(record(1)) + render(record(2))
    assert path.read_bytes() == render(record(3))


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "0.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FailedPrecondition, match="log_path"):
        LogWriter(tmp_path / "0.log", tmp_path / "position").open()
    assert not (tmp_path / "elsewhere").exists()


def test_without_a_path_records_are_only_counted(tmp_path: Path) -> None:
    writer = LogWriter(None, tmp_path / "position")
    writer.open()
    writer.write([record(1), record(2)])
    writer.close()
    again = LogWriter(None, tmp_path / "position")
    again.open()
    assert again.seq == 2
    again.close()
