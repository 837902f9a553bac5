"""What containers write."""

from __future__ import annotations

import msgspec


class OutputRecord(msgspec.Struct, frozen=True):
    """One line of output, or a part of one.

    Attributes:
        seq: Counts from 1 without gaps, both streams together.
        time_ns: Nanoseconds since the epoch, by the guest's clock.
        partial: The line goes on in the stream's next record.
        data: At most 16 KiB, no newline.
    """

    seq: int
    stderr: bool
    time_ns: int
    partial: bool
    data: bytes
