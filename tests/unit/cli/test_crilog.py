from __future__ import annotations

import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmruntime.cli.crilog import Entry, LogFile, MalformedLine, Printer, Stream, last_lines, parse_line
from vmruntime.logs.format import render
from vmruntime.model.output import OutputRecord

TEXT = st.binary(max_size=40).map(lambda data: data.replace(b"\n", b""))
ENTRIES = st.lists(
    st.builds(Entry, time=st.just("T"), stream=st.sampled_from(Stream), partial=st.booleans(), text=TEXT)
)


def line_of(entry: Entry) -> bytes:
    return f"{entry.time} {entry.stream.value} {'P' if entry.partial else 'F'} ".encode() + entry.text


def read_all(log: LogFile) -> list[Entry]:
    entries: list[Entry] = []
    while more := log.read():
        entries += more
    return entries


@given(TEXT, st.booleans(), st.booleans(), st.integers(0, 2**62))
def test_reads_what_the_daemon_writes(text: bytes, partial: bool, stderr: bool, time_ns: int) -> None:
    record = OutputRecord(seq=1, time_ns=time_ns, stderr=stderr, partial=partial, data=text)
    entry = parse_line(render(record).removesuffix(b"\n"))
    assert (entry.text, entry.partial, entry.stream is Stream.STDERR) == (text, partial, stderr)


@given(st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"")))
def test_any_bytes_are_a_line_or_malformed(line: bytes) -> None:
    try:
        entry = parse_line(line)
    except MalformedLine:
        return
    assert line.endswith(entry.text)


@pytest.mark.parametrize(
    "line",
    [b"", b"T", b"T stdout", b"T stdin F x", b"T stdout X x", b" stdout F x", b"T stdout  F x", b"\xff stdout F x"],
)
def test_malformed(line: bytes) -> None:
    with pytest.raises(MalformedLine):
        parse_line(line)


def test_reserved_tags_and_missing_text() -> None:
    assert parse_line(b"T stdout P:more:x a b ") == Entry("T", Stream.STDOUT, True, b"a b ")
    assert parse_line(b"T stderr F") == Entry("T", Stream.STDERR, False, b"")


@given(ENTRIES, st.lists(st.integers(1, 50)))
def test_a_file_read_while_it_grows_gives_every_entry_once(entries: list[Entry], cuts: list[int]) -> None:
    data = b"".join(line_of(entry) + b"\n" for entry in entries)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "log"
        log = LogFile(path)
        assert log.read() == []
        seen: list[Entry] = []
        with path.open("wb", buffering=0) as file:
            for cut in cuts:
                file.write(data[:cut])
                data = data[cut:]
                seen += read_all(log)
            file.write(data)
        seen += read_all(log)
        log.close()
    assert seen == entries
    assert log.malformed == 0


@given(ENTRIES, st.booleans())
def test_printing_gives_each_stream_its_bytes(entries: list[Entry], timestamps: bool) -> None:
    outputs = {stream: io.BytesIO() for stream in Stream}
    Printer(outputs[Stream.STDOUT], outputs[Stream.STDERR], timestamps=timestamps).write(entries)
    for stream in Stream:
        expected, inside = b"", False
        for entry in entries:
            if entry.stream is stream:
                expected += (b"T " if timestamps and not inside else b"") + entry.text
                expected += b"" if entry.partial else b"\n"
                inside = entry.partial
        assert outputs[stream].getvalue() == expected


@given(ENTRIES, st.integers(0, 5))
def test_last_lines_is_the_end_of_all(entries: list[Entry], count: int) -> None:
    kept = last_lines(entries, count)
    lines = {stream: sum(not e.partial for e in kept if e.stream is stream) for stream in Stream}
    assert sum(lines.values()) <= count
    assert last_lines(entries, len(entries)) == entries
    # What is kept of each stream is the end of that stream.
    for stream in Stream:
        mine = [entry for entry in entries if entry.stream is stream]
        part = [entry for entry in kept if entry.stream is stream]
        assert part == mine[len(mine) - len(part) :]


def test_rotation_and_truncation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"T stdout F 1\n")
    log = LogFile(path)
    assert [entry.text for entry in read_all(log)] == [b"1"]
    with path.open("ab") as old:
        path.rename(tmp_path / "log.1")
        old.write(b"T stdout F 2\n")
        old.flush()
        assert [entry.text for entry in read_all(log)] == [b"2"]
        path.write_bytes(b"T stdout F 4\n")
        old.write(b"T stdout F 3\n")
    assert [entry.text for entry in read_all(log)] == [b"3", b"4"]
    path.write_bytes(b"T stdout F\n")
    assert read_all(log) == []
    path.write_bytes(b"T stdout F\nT stdout F 5\n")
    assert [entry.text for entry in read_all(log)][-1:] == [b"5"]
    log.close()
