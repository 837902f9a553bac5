"""What each measure is in a line, and what is promised of it; SPECIFICATION.md has the same and the reasons."""

from __future__ import annotations

import msgspec

from bench.records import Record


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """One measure's.

    Attributes:
        what: What is measured.
        figure: What a limit is about: "ratio", "p50", "p99", or a name in `extra`; empty: nothing is promised yet.
        at_most, at_least: The limit.
        words: The promise in words, where the figure's name does not give them.
    """

    what: str
    figure: str = ""
    at_most: float | None = None
    at_least: float | None = None
    words: str = ""

    def text(self) -> str:
        """Return the promise in words."""
        if self.words or not self.figure:
            return self.words or "none yet"
        limit = f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"
        return f"{limit} times the peer, p50"

    def kept(self, record: Record) -> bool | None:
        """Return whether a record keeps it; None when nothing is promised or the figure is not there."""
        value = getattr(record, self.figure, None) if self.figure in ("ratio", "p50", "p99") else None
        value = record.extra.get(self.figure) if value is None else value
        if not self.figure or value is None:
            return None
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)


PROMISES: dict[str, Promise] = {
    "sandbox_start_cold": Promise(what="RunPodSandbox when the guest boots", figure="ratio", at_most=1.25),
    "sandbox_start_template": Promise(what="RunPodSandbox from the template", figure="ratio", at_most=0.15),
    "sandbox_start_warm": Promise(what="RunPodSandbox when a VM waits", figure="ratio", at_most=1.0),
    "first_output": Promise(what="from no pod to the container's first line in its log"),
    "container_start": Promise(
        what="CreateContainer and StartContainer",
        figure="over_crun_ms",
        at_most=60,
        words="at most 60 ms more than `crun run`, p50",
    ),
    "exec_sync": Promise(what="ExecSync of `true`"),
    "exec_throughput": Promise(what="bytes out of a command through Exec", figure="ratio", at_least=0.8),
    "port_forward_throughput": Promise(what="bytes out of a port through PortForward"),
    "net_throughput": Promise(what="TCP from the pod to the host"),
    "guest_read": Promise(what="reads of an image's layer", figure="ratio", at_least=0.9),
    "virtiofs_read": Promise(what="reads of a mounted directory of the host", figure="ratio", at_least=1.0),
    "pss_idle_pod": Promise(
        what="memory of an idle pod, all its processes",
        figure="p50",
        at_most=85.8,
        words="at most 90 MB (85.8 MiB), p50",
    ),
    "daemon_rss_20_pods": Promise(
        what="memory of the daemon with 20 pods", figure="p50", at_most=80, words="at most 80 MiB"
    ),
    "event_loop_stall": Promise(
        what="how late the daemon's tasks come to their turn under load",
        figure="p99",
        at_most=20,
        words="p99 at most 20 ms",
    ),
    "ten_pods_at_once": Promise(what="ten calls of RunPodSandbox at once", figure="ratio", at_most=3.0),
    "image_pull": Promise(what="PullImage until the image can be run", figure="ratio", at_most=1.2),
    "list_200_pods": Promise(what="ListPodSandbox of 200 pods"),
    "status_200_pods": Promise(what="PodSandboxStatus of one of 200 pods"),
    "image_pod_start": Promise(what="an image pod until its kernel starts", figure="ratio", at_most=1.3),
    "pss_idle_image_pod": Promise(what="memory of an idle image pod"),
}
