"""Changes, for kubelet's evented pod lifecycle."""

from __future__ import annotations

from vmruntime.cri.translate.container import container_status
from vmruntime.cri.translate.sandbox import sandbox_status
from vmruntime.generated import cri_pb2 as cri
from vmruntime.pods.interface import PodEvent, PodEventKind

_KINDS: dict[PodEventKind, cri.ContainerEventType.ValueType] = {
    PodEventKind.CREATED: cri.CONTAINER_CREATED_EVENT,
    PodEventKind.STARTED: cri.CONTAINER_STARTED_EVENT,
    PodEventKind.STOPPED: cri.CONTAINER_STOPPED_EVENT,
    PodEventKind.DELETED: cri.CONTAINER_DELETED_EVENT,
}


def event_to_cri(event: PodEvent) -> cri.ContainerEventResponse:
    """Translate a change with the picture after it; a removed sandbox has no status (kubelet skips such an event)."""
    return cri.ContainerEventResponse(
        container_id=event.id,
        container_event_type=_KINDS[event.kind],
        created_at=event.time,
        pod_sandbox_status=sandbox_status(event.sandbox) if event.sandbox else None,
        containers_statuses=[container_status(container) for container in event.containers],
    )
