"""The container that a VM runs once while it waits for its pod, so that the pod's own find everything at hand."""

from __future__ import annotations

import msgspec

from vmruntime.errors import InvalidArgument
from vmruntime.model.container import ContainerMetadata, ContainerSpec
from vmruntime.model.image import ImageConfig
from vmruntime.model.sandbox import SandboxMetadata, SandboxSpec
from vmruntime.pods.oci.spec import build_oci_spec


def rehearsal_spec() -> bytes:
    """Return the configuration (config.json) of a container of which nothing special is asked."""

    def no_profile(name: str) -> bytes:
        raise InvalidArgument(f"no profile {name!r} for a rehearsal")

    metadata = SandboxMetadata(name="rehearsal", uid="rehearsal", namespace="vmruntime")
    container = ContainerSpec(metadata=ContainerMetadata(name="rehearsal"), image="", command=["true"])
    spec = build_oci_spec(container, ImageConfig(), SandboxSpec(metadata=metadata), load_profile=no_profile)
    return msgspec.json.encode(spec)
