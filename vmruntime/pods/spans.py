"""What spans say of pods and containers, under the names of OpenTelemetry's conventions for Kubernetes."""

from __future__ import annotations

from vmruntime import tracing
from vmruntime.errors import NotFound
from vmruntime.model.container import Container
from vmruntime.model.sandbox import SandboxSpec
from vmruntime.pods.context import Context
from vmruntime.recorder import Attributes, PodNames


def note_pod(sandbox_id: str, spec: SandboxSpec, more: Attributes | None = None) -> None:
    """Say which pod the call that is going on is about, and what else is known of it; the call is kept with the pod's."""
    metadata = spec.metadata
    tracing.about(
        PodNames(sandbox_id, metadata.name, metadata.namespace, metadata.uid),
        {
            "k8s.pod.name": metadata.name,
            "k8s.namespace.name": metadata.namespace,
            "k8s.pod.uid": metadata.uid,
            "vmruntime.sandbox.id": sandbox_id,
            "vmruntime.sandbox.kind": spec.kind.value,
            **(more or {}),
        },
    )


def note_sandbox(context: Context, sandbox_id: str, more: Attributes | None = None) -> None:
    """Say which pod a sandbox's id stands for; nothing of an unknown one."""
    try:
        note_pod(sandbox_id, context.registry.sandbox(sandbox_id).spec, more)
    except NotFound:
        return


def note_container(context: Context, container_id: str) -> None:
    """Say which container an id stands for, and its pod; nothing of an unknown one."""
    try:
        note_made(context, context.registry.container(container_id))
    except NotFound:
        return


def note_made(context: Context, container: Container) -> None:
    """Say which container a span is about, and its pod."""
    note_sandbox(
        context,
        container.sandbox_id,
        {
            "container.id": container.id,
            "k8s.container.name": container.spec.metadata.name,
            "container.image.name": container.spec.user_image or container.spec.image,
            "container.image.id": container.image_id,
        },
    )
