"""vmruntime's own calls on what calls on pods did lately (proto/maintenance.proto)."""

from __future__ import annotations

import time
from typing import Any

from vmruntime.cri.translate.checks import required
from vmruntime.generated import maintenance_pb2 as own
from vmruntime.generated.maintenance_pb2_grpc import PodTracesServicer
from vmruntime.recorder import Attributes, Call, Part, Recorder


class PodTraces(PodTracesServicer):
    """Every method of vmruntime.v1.PodTraces."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def ListTracedPods(self, request: own.ListTracedPodsRequest, context: Any) -> own.ListTracedPodsResponse:
        """Return the pods of which there are calls."""
        pods = [
            own.TracedPod(pod_sandbox_id=pod.id, name=pod.name, namespace=pod.namespace, uid=pod.uid, gone=gone)
            for pod, gone in self._recorder.pods()
        ]
        return own.ListTracedPodsResponse(pods=pods)

    async def GetPodTrace(self, request: own.GetPodTraceRequest, context: Any) -> own.GetPodTraceResponse:
        """Return the calls on a pod."""
        required("pod_sandbox_id", request.pod_sandbox_id)
        calls = self._recorder.calls(request.pod_sandbox_id)
        return own.GetPodTraceResponse(calls=[_call(one, time.monotonic()) for one in calls])


def _call(call: Call, now: float) -> own.TracedCall:
    about = call.attributes
    return own.TracedCall(
        started_at=call.started_at,
        container_id=str(about.get("container.id", "")),
        container_name=str(about.get("k8s.container.name", "")),
        whole=_part(call.whole, call.whole.start, now, about),
        left_out=call.left_out,
    )


def _part(part: Part, zero: float, now: float, about: Attributes | None) -> own.TracedPart:
    return own.TracedPart(
        name=part.name,
        start_ns=_ns(part.start - zero),
        duration_ns=_ns((part.end or now) - part.start),
        going_on=not part.end,
        error=part.error,
        attributes={key: str(value) for key, value in (about or {}).items()},
        parts=[_part(one, zero, now, one.attributes) for one in part.parts or ()],
    )


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
