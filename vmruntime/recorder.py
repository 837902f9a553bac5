"""What calls on pods did lately, in memory: for those who ask afterwards where a start's time went, or why it failed.

Every call is taken down; it is kept once it is known which pod it is about. Bounded in every direction: parts of a call, calls
of a pod, pods that are gone, and parts in all.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict, deque
from collections.abc import Mapping

Attributes = Mapping[str, str | int | bool]

CALL_PARTS = 256
POD_CALLS = 24
"""The last ones; the first, which is the pod's start, is kept besides."""
GONE_PODS = 16
ALL_PARTS = 30_000
"""Some 6 MB. A pod with a container or two has 80."""

FREQUENT = frozenset({"ExecSync"})
"""Calls that probes make all the time; they would push out those that change pods."""


class Part:
    """A part of a call. Times are of time.monotonic(); an end of 0: it goes on.

    Attributes:
        error: Why it failed; empty: it did not.
        parts: In the order of their beginnings; None: it has none.
    """

    __slots__ = ("attributes", "end", "error", "name", "parts", "start")

    def __init__(self, name: str, attributes: Attributes | None, start: float) -> None:
        self.name = name
        self.attributes = attributes
        self.start = start
        self.end = 0.0
        self.error = ""
        self.parts: list[Part] | None = None


class Call:
    """A call and its parts.

    Attributes:
        whole: The call itself, under its method's name.
        attributes: What it is about.
        started_at: Nanoseconds since the epoch.
        count: Of its parts, itself included.
        left_out: How many parts there were too many.
        open: How many things go on that are parts of it: its answering, and work that its caller may not wait for. When there
            are none any more, what tasks still do that it has started is no part of it.
        kept_by: Who keeps it; None: nobody (yet, or any more).
    """

    __slots__ = ("attributes", "count", "kept_by", "left_out", "open", "started_at", "whole")

    def __init__(self, method: str) -> None:
        self.whole = Part(method, None, time.monotonic())
        self.attributes: dict[str, str | int | bool] = {}
        self.started_at = time.time_ns()
        self.count = 1
        self.left_out = 0
        self.kept_by: Recorder | None = None
        self.open = 1

    def begin(self, outer: Part, name: str, attributes: Attributes | None, start: float) -> Part | None:
        """Begin a part of a part; None: there are too many."""
        if self.count >= CALL_PARTS:
            self.left_out += 1
            return None
        part = Part(name, attributes, start)
        if outer.parts is None:
            outer.parts = [part]
        else:
            outer.parts.append(part)
        self.count += 1
        if self.kept_by is not None:
            self.kept_by.total += 1
        return part


@dataclasses.dataclass(frozen=True)
class PodNames:
    """Which pod it is."""

    id: str
    name: str
    namespace: str
    uid: str


@dataclasses.dataclass(frozen=True)
class _Pod:
    names: PodNames
    first: Call
    later: deque[Call] = dataclasses.field(default_factory=deque)

    def calls(self) -> list[Call]:
        return [self.first, *self.later]


class Recorder:
    """The calls on each pod, oldest first.

    Attributes:
        total: Parts of all calls that are kept.
    """

    def __init__(self, *, pod_calls: int = POD_CALLS, gone_pods: int = GONE_PODS, all_parts: int = ALL_PARTS) -> None:
        self.total = 0
        self._pod_calls = pod_calls
        self._gone_pods = gone_pods
        self._all_parts = all_parts
        self._pods: OrderedDict[str, _Pod] = OrderedDict()  # those called last are last
        self._gone: OrderedDict[str, _Pod] = OrderedDict()

    def keep(self, call: Call, names: PodNames) -> None:
        """Keep a call on a pod, from now on, though it goes on; it is kept, or a FREQUENT one: nothing."""
        if call.kept_by is not None or call.whole.name in FREQUENT:
            return
        pod = self._pods.get(names.id)
        if pod is None:
            self._pods[names.id] = _Pod(names, call)
        else:
            self._pods.move_to_end(names.id)
            pod.later.append(call)
            if len(pod.later) > self._pod_calls:
                self._forget(pod.later.popleft())
        call.kept_by = self
        self.total += call.count
        self._make_room()

    def gone(self, sandbox_id: str) -> None:
        """Note that a pod is gone; the calls of the last few are kept."""
        pod = self._pods.pop(sandbox_id, None)
        if pod is not None:
            self._gone[sandbox_id] = pod
            if len(self._gone) > self._gone_pods:
                self._drop(self._gone)

    def pods(self) -> list[tuple[PodNames, bool]]:
        """Return every pod that has calls here, and whether it is gone; those that went first are first."""
        return [(pod.names, gone) for pods, gone in ((self._gone, True), (self._pods, False)) for pod in pods.values()]

    def calls(self, sandbox_id: str) -> list[Call]:
        """Return the calls on a pod; of an unknown one none."""
        pod = self._pods.get(sandbox_id) or self._gone.get(sandbox_id)
        return pod.calls() if pod is not None else []

    def _make_room(self) -> None:
        """Drop pods while there is too much: those that are gone first, then those not called for longest."""
        while self.total > self._all_parts and (self._gone or len(self._pods) > 1):
            self._drop(self._gone or self._pods)

    def _drop(self, pods: OrderedDict[str, _Pod]) -> None:
        for call in pods.popitem(last=False)[1].calls():
            self._forget(call)

    def _forget(self, call: Call) -> None:
        self.total -= call.count
        call.kept_by = None
