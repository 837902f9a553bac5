"""What containers write."""

from __future__ import annotations

import msgspec


class OutputRecord(msgspec.Struct, frozen=True):
    """One line of output, or a part of one.

    Attributes:
        seq: Above 0 and above that of the record before; where to read on. Our agent counts from 1 without gaps, both
            streams together; a serial console's are offsets in its file.
        time_ns: Nanoseconds since the epoch, by the clock of whoever made the record: the guest's, if our agent did.
        partial: The line goes on in the stream's next record.
        data: At most 16 KiB, no newline.
    """

    seq: int
    stderr: bool
    time_ns: int
    partial: bool
    data: bytes
