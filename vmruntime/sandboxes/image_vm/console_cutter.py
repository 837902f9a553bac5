r"""What a serial terminal was sent, cut into lines for a log, without I/O.

A line ends at a newline. Carriage returns and NULs right before it (up to 16: terminals are sent "\r\n", some of them
"\r\r\n" or NULs as padding) belong to the end of the line; other NULs are left out; every other byte stays, so that
colours and progress bars look in `kubectl logs` as they would on the terminal.

Where a record begins, nothing of what was before matters: the same bytes are cut alike wherever reading began, as long as
that was the end of a record.
"""

from __future__ import annotations

from typing import NamedTuple

from vmruntime.agent.interface import RECORD_LIMIT

_END_RUN = 16
_PADDING = b"\r\0"


class Piece(NamedTuple):
    """A record to be.

    Attributes:
        end: Offset in the file right behind it, with the newline.
        partial: The line goes on.
    """

    end: int
    partial: bool
    data: bytes


class Cutter:
    """Holds the beginning of a line until its end has come.

    Attributes:
        at: Offset in the file of what is held.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self._held = bytearray()

    @property
    def reached(self) -> int:
        """Offset of the next byte to feed."""
        return self.at + len(self._held)

    @property
    def shown(self) -> int:
        """Offset behind the text that is held, which cut() can give out; `at`: there is none."""
        end = len(self._held) - _end_run(self._held)
        return self.at + end if self._held[:end].strip(b"\0") else self.at

    def feed(self, data: bytes) -> list[Piece]:
        """Take bytes; return what they complete.

        Of a line that is too long a piece is cut only when there is a byte more: if that is the newline, it fitted.
        """
        self._held += data
        held, start, pieces = self._held, 0, list[Piece]()
        while True:
            newline = held.find(b"\n", start, start + RECORD_LIMIT + 1)
            if newline >= 0:
                line = bytes(held[start:newline])
                text = line[: len(line) - _end_run(line)]
                start = newline + 1
                pieces.append(Piece(self.at + start, False, text.replace(b"\0", b"")))
            elif len(held) - start > RECORD_LIMIT:
                # What may turn out to be the end of the line stays for the next piece.
                part = bytes(held[start : start + RECORD_LIMIT])
                part = part[: len(part) - _end_run(part)]
                start += len(part)
                if text := part.replace(b"\0", b""):
                    pieces.append(Piece(self.at + start, True, text))
            else:
                break
        del held[:start]
        self.at += start
        return pieces

    def cut(self, end: int) -> Piece | None:
        """Give out what is held before the offset `end`, as a part of a line; None: it is no text."""
        return self._take(end, partial=True)

    def finish(self) -> Piece | None:
        """Give out what is held as a whole line, since nothing follows; None: it is no text."""
        held = len(self._held) - _end_run(self._held)
        piece = self._take(self.at + held, partial=False)
        self._take(self.reached, partial=False)
        return piece

    def _take(self, end: int, *, partial: bool) -> Piece | None:
        length = max(0, end - self.at)
        text = bytes(self._held[:length]).replace(b"\0", b"")
        del self._held[:length]
        self.at += length
        return Piece(self.at, partial, text) if text else None


def _end_run(line: bytes | bytearray) -> int:
    """Return how many bytes at the end may belong to the end of the line."""
    run = 0
    while run < min(len(line), _END_RUN) and line[-1 - run] in _PADDING:
        run += 1
    return run
