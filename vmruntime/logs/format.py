"""One line of a CRI log file.

The format is kubelet's (k8s.io/cri-client/pkg/logs): time in RFC 3339 with nanoseconds, stream, F for a full line or P
for one that goes on, then the text.
"""

from __future__ import annotations

import time

from vmruntime.model.output import OutputRecord


def render(record: OutputRecord) -> bytes:
    """Return the log line of a record. The same record always gives the same bytes: a restarted daemon counts on it."""
    seconds, nanoseconds = divmod(record.time_ns, 1_000_000_000)
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    stream = "stderr" if record.stderr else "stdout"
    tag = "P" if record.partial else "F"
    return f"{moment}.{nanoseconds:09d}Z {stream} {tag} ".encode() + record.data + b"\n"
