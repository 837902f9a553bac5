"""A console's bytes become the same log, whoever reads them and however often the daemon is killed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from vmruntime.agent.interface import RECORD_LIMIT
from vmruntime.logs.format import render
from vmruntime.logs.writer import LogWriter
from vmruntime.model.output import OutputRecord
from vmruntime.sandboxes.image_vm import console_cutter, console_journal, console_records
from vmruntime.sandboxes.image_vm.console_cutter import Cutter, Piece
from vmruntime.sandboxes.image_vm.console_records import BLOCK, TAIL_BYTES, ConsoleFile, Records

MARK = re.compile(rb"\[(\d+) bytes of console output were dropped\]")


class Ticks:
    """A clock of which no two looks are alike."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_123_456_789

    def now_ns(self) -> int:
        self.now += 1_000_003
        return self.now

    def monotonic(self) -> float:
        return self.now_ns() / 1e9


def text_of(console: bytes) -> bytes:
    """What a log of these bytes says."""
    return re.sub(rb"[\r\0]{1,16}(\n|\Z)", rb"\1", console).replace(b"\0", b"")


def said(records: list[OutputRecord]) -> bytes:
    return b"".join(record.data + (b"" if record.partial else b"\n") for record in records)


class Daemon:
    """The part of a daemon that makes a log of a console; kill() leaves what a SIGKILL does."""

    def __init__(self, directory: Path, start: int = 0) -> None:
        self.path = directory / "console.log"
        self.log = directory / "0.log"
        self._position = directory / "position"
        self._clock = Ticks()
        self._start = start
        self.made: dict[int, OutputRecord] = {}
        self.path.touch()
        self._begin()

    def _begin(self) -> None:
        self._clock.now += 3_600_000_000_000
        self.file = ConsoleFile(self.path, self._start, self._clock)
        self._writer = LogWriter(self.log, self._position)
        self._writer.open()
        self.records = Records(self.file, self._writer.seq)
        self._pending: list[OutputRecord] = []

    def step(self) -> None:
        for record in self.records.step():
            assert self.made.setdefault(record.seq, record) == record
            assert len(record.data) <= RECORD_LIMIT
            assert b"\n" not in record.data
            assert b"\0" not in record.data
            self._pending.append(record)

    def drain(self) -> None:
        self.records.drained = False
        while not (self.records.drained or self.records.ended):
            self.step()

    def write(self, *, acknowledge: bool) -> None:
        self._writer.write(self._pending)
        self._pending = []
        if acknowledge:
            self.file.free(self._writer.seq)

    def kill(self, torn: int) -> None:
        """Die after so many bytes of the records that are not noted, behind what an earlier daemon wrote of them."""
        self._writer.close()
        surplus = self._writer._skip
        whole = b"".join(map(render, self._pending))
        with self.log.open("ab") as log:
            log.write(whole[surplus : surplus + torn])
        self._begin()

    def finish(self) -> bytes:
        self.file.end()
        self.drain()
        self.write(acknowledge=True)
        self._writer.close()
        return self.log.read_bytes()

    def whole_log(self) -> bytes:
        return b"".join(render(self.made[seq]) for seq in sorted(self.made))


bits = st.sampled_from(
    [b"a", b"\n", b"\r", b"\0", b"word ", b"\r\n", b"\r\r\n", b"\r\0\n", b"x" * 30, b"\r" * 20, b"\0" * 50, b"\x1b[0m"]
)
output = st.lists(bits, max_size=12).map(b"".join)
acts = st.one_of(
    output,
    st.sampled_from(["step", "cut", "write", "write+ack", "bound", "end"]),
    st.integers(0, 600),
)


def play(daemon: Daemon, steps: list[bytes | str | int]) -> bytes:
    """Let a machine write and its daemon do things, and be killed; return what the machine wrote."""
    console = b""
    for act in steps:
        if isinstance(act, bytes):
            console += act
            with daemon.path.open("ab") as file:
                file.write(act)
        elif isinstance(act, int):
            daemon.kill(act)
        elif act == "step":
            daemon.step()
        elif act == "cut":
            daemon.records.cut()
        elif act == "bound":
            daemon.file.bound()
        elif act == "end":
            break
        else:
            daemon.write(acknowledge=act == "write+ack")
    return console


@given(st.lists(acts, max_size=40), st.binary(max_size=100))
@settings(max_examples=examples(150), deadline=None)
def test_the_log_says_what_the_console_said(
    tmp_path_factory: pytest.TempPathFactory, steps: list[bytes | str | int], before: bytes
) -> None:
    directory = tmp_path_factory.mktemp("console")
    (directory / "console.log").write_bytes(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console_cutter, "RECORD_LIMIT", 40)
        patch.setattr(console_records, "CHUNK", 25)
        patch.setattr(console_journal, "COMPACT", 3)
        daemon = Daemon(directory, len(before))
        console = play(daemon, steps)
        log = daemon.finish()
    assert log == daemon.whole_log()
    records = list(daemon.made.values())
    assert said(records).rstrip(b"\n") == text_of(console).rstrip(b"\n")
    assert all(seq > len(before) for seq in daemon.made)


@example([b"aaaa" + b"\r" * 20 + b"\0" * 52, "step", b"x" * 36, "cut", "bound"])
@given(st.lists(acts, max_size=60))
@settings(max_examples=examples(150), deadline=None)
def test_what_is_dropped_is_said_and_nothing_else_is_lost(
    tmp_path_factory: pytest.TempPathFactory, steps: list[bytes | str | int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console_cutter, "RECORD_LIMIT", 40)
        patch.setattr(console_records, "CHUNK", 25)
        patch.setattr(console_records, "BACKLOG_LIMIT", 100)
        patch.setattr(console_records, "BLOCK", 8)
        patch.setattr(console_records, "TAIL_BYTES", 16)
        daemon = Daemon(tmp_path_factory.mktemp("console"))
        console = play(daemon, steps)
        log = daemon.finish()
    assert log == daemon.whole_log()
    seq, begin = 0, 0
    parts: list[OutputRecord] = []
    for record in [*daemon.made.values(), None]:
        mark = MARK.fullmatch(record.data) if record is not None else None
        if record is None or mark:
            # What was given out between two holes is just what the console said there.
            end = seq if record is not None else len(console)
            # Carriage returns right before a hole may stay: whether they end a line, nobody knows.
            ending = b"\n" if record is None else b"\r\n"
            assert said(parts).rstrip(ending) == text_of(console[begin:end]).rstrip(ending)
            parts = []
        if record is not None and mark:
            assert int(mark[1]) == record.seq - seq
            begin = record.seq
        elif record is not None:
            parts.append(record)
        seq = record.seq if record is not None else seq


def test_a_line_of_just_the_limit_is_whole() -> None:
    line = b"x" * RECORD_LIMIT
    assert Cutter(7).feed(line + b"\n") == [Piece(7 + RECORD_LIMIT + 1, False, line)]
    cutter = Cutter(0)
    assert cutter.feed(line) == []
    assert cutter.feed(b"\n") == [Piece(RECORD_LIMIT + 1, False, line)]
    assert Cutter(0).feed(line + b"y\n") == [Piece(RECORD_LIMIT, True, line), Piece(RECORD_LIMIT + 2, False, b"y")]


def test_terminal_control_stays_and_line_ends_go() -> None:
    pieces = Cutter(0).feed(b"\x1b[32mOK\x1b[0m\r\n 10%\r 20%\r\r\nnul\0\0s\r\0\n\n")
    assert [piece.data for piece in pieces] == [b"\x1b[32mOK\x1b[0m", b" 10%\r 20%", b"nuls", b""]
    assert not any(piece.partial for piece in pieces)


def test_a_prompt_is_given_out_in_parts(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.path.write_bytes(b"\r\nhost login: ")
    daemon.step()
    daemon.records.cut()
    daemon.step()
    daemon.path.write_bytes(b"\r\nhost login: root\r\n")
    daemon.drain()
    assert [(r.data, r.partial) for r in daemon.made.values()] == [
        (b"", False), (b"host login: ", True), (b"root", False),
    ]  # fmt: skip


def test_nothing_but_padding_is_no_record(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.path.write_bytes(b"\0" * 100_000 + b"\r")
    daemon.drain()
    daemon.records.cut()
    daemon.drain()
    assert daemon.finish() == b""


def test_another_run_begins_where_the_one_before_ended(tmp_path: Path) -> None:
    first = Daemon(tmp_path)
    first.path.write_bytes(b"one\nhalf")
    first.step()
    end = first.file.end()
    assert end == 8
    with first.path.open("ab") as file:
        file.write(b"two\n")
    clock = Ticks()
    second = Records(ConsoleFile(first.path, end, clock), 0)
    assert [(r.seq, r.data) for r in second.step()] == [(12, b"two")]
    assert first.file.end() == end
    assert ConsoleFile(first.path, 0, clock).end() == end
    first.finish()
    assert [(r.data, r.partial) for r in first.made.values()] == [(b"one", False), (b"half", False)]


def test_acknowledged_output_gives_its_disk_back(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.path.write_bytes(b"a line of a console\r\n" * 100_000)
    size = daemon.path.stat().st_size
    daemon.drain()
    assert daemon.path.stat().st_blocks * 512 >= size
    daemon.write(acknowledge=True)
    assert daemon.path.stat().st_size == size
    assert daemon.path.stat().st_blocks * 512 <= TAIL_BYTES + 2 * BLOCK
    assert daemon.path.read_bytes()[-TAIL_BYTES:] == (b"a line of a console\r\n" * 100_000)[-TAIL_BYTES:]
    daemon.kill(0)
    daemon.drain()
    assert len(daemon.made) == 100_000


def test_output_without_a_reader_is_bounded(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    with daemon.path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 300 * 1024 * 1024)
    assert daemon.file.bound()
    assert not daemon.file.bound()
    assert daemon.path.stat().st_blocks * 512 <= 33 * 1024 * 1024
    os.truncate(daemon.path, 400 * 1024 * 1024)
    assert daemon.file.bound()
    assert len(daemon.file.journal) == 1  # nobody has seen the first
    daemon.step()
    assert [r.data for r in daemon.made.values()] == [b"[385875968 bytes of console output were dropped]"]


def test_a_journal_torn_by_a_crash_of_the_host_is_mended(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.path.write_bytes(b"one\n")
    daemon.step()
    journal = tmp_path / "console.log.0.seen"
    with journal.open("ab") as file:
        file.write(b"torn")
    daemon.kill(0)
    assert journal.stat().st_size == 16
    daemon.path.write_bytes(b"one\ntwo\n")
    daemon.drain()
    daemon.kill(0)
    daemon.drain()
    assert [record.data for record in daemon.made.values()] == [b"one", b"two"]


def test_a_file_that_shrinks_or_is_none_is_an_error(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.path.write_bytes(b"one\n")
    daemon.drain()
    os.truncate(daemon.path, 0)
    with pytest.raises(OSError, match="fewer than were read"):
        daemon.step()
    daemon.path.unlink()
    daemon.path.symlink_to("/etc/passwd")
    daemon.records = Records(daemon.file, 0)
    with pytest.raises(OSError, match="symbolic link"):
        daemon.drain()
