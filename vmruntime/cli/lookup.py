"""From what a person types to one pod or container: a full id, the start of one, or a unique name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vmruntime.cli.client import Client
from vmruntime.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from vmruntime.generated import cri_pb2, maintenance_pb2
from vmruntime.ids import short_id

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Inventory:
    """All pods and containers at one moment."""

    pods: Sequence[cri_pb2.PodSandbox]
    containers: Sequence[cri_pb2.Container]

    @classmethod
    def fetch(cls, client: Client) -> Inventory:
        """Ask the daemon."""
        # Containers first: a container listed with a pod that is listed later is shown, never one without its pod.
        containers = client.call(client.runtime.ListContainers, cri_pb2.ListContainersRequest()).containers
        pods = client.call(client.runtime.ListPodSandbox, cri_pb2.ListPodSandboxRequest()).items
        return cls(pods=list(pods), containers=list(containers))

    def of_pod(self, pod_id: str) -> list[cri_pb2.Container]:
        """Return the containers of one pod, oldest first."""
        mine = [container for container in self.containers if container.pod_sandbox_id == pod_id]
        return sorted(mine, key=lambda container: container.created_at)

    def find(self, text: str) -> cri_pb2.PodSandbox | cri_pb2.Container:
        """Return the pod or container that is meant.

        A name that a pod shares with a container of its own means the pod, which contains it.

        Raises:
            NotFound: Nothing has that id or name.
            InvalidArgument: Several have; the message lists them.
        """
        pods = _matches(text, self.pods, lambda pod: (pod.id, pod.metadata.name))
        containers = _matches(text, self.containers, lambda c: (c.id, c.metadata.name))
        if len(pods) == 1 and all(container.pod_sandbox_id == pods[0].id for container in containers):
            return pods[0]
        candidates: list[cri_pb2.PodSandbox | cri_pb2.Container] = [*pods, *containers]
        return _only(text, candidates, "pod or container")

    def find_pod(self, text: str) -> cri_pb2.PodSandbox:
        """Return the pod that is meant; raises as find() does."""
        return _only(text, _matches(text, self.pods, lambda pod: (pod.id, pod.metadata.name)), "pod")

    def find_container(self, text: str, name: str = "", *, running: bool = False) -> cri_pb2.Container:
        """Return the container that is meant, by itself or by its pod.

        Args:
            text: A container, or a pod with one container.
            name: The container's name within the pod `text`; empty: the only one.
            running: Choose among running containers, and refuse one that does not run.

        Raises:
            NotFound: Nothing has that id or name.
            InvalidArgument: Several have; the message lists them.
            FailedPrecondition: It is not running, and `running` is asked for.
        """
        if name:
            pod = self.find_pod(text)
            named = [container for container in self.of_pod(pod.id) if container.metadata.name == name]
            # Restarts leave earlier attempts behind; the newest is what the name means now.
            found = named[-1] if named else None
            if found is None:
                raise NotFound(f"pod {describe(pod)} has no container named {name!r}")
        else:
            target = self.find(text)
            found = self._only_of(target, running) if isinstance(target, cri_pb2.PodSandbox) else target
        if running and found.state != cri_pb2.CONTAINER_RUNNING:
            raise FailedPrecondition(f"container {describe(found)} is not running")
        return found

    def _only_of(self, pod: cri_pb2.PodSandbox, running: bool) -> cri_pb2.Container:
        all_containers = self.of_pod(pod.id)
        alive = [container for container in all_containers if container.state == cri_pb2.CONTAINER_RUNNING]
        choice = alive if running or (len(alive) == 1 and len(all_containers) > 1) else all_containers
        if not choice:
            what = "running container" if running else "container"
            raise FailedPrecondition(f"pod {describe(pod)} has no {what}")
        return _only(pod.metadata.name, choice, "container of the pod", remedy="choose with --container NAME")


def find_gone(text: str, pods: Sequence[maintenance_pb2.TracedPod]) -> maintenance_pb2.TracedPod:
    """Return the pod that is meant, of those of which there are still calls; of several of one name the newest.

    Raises:
        NotFound: None has that id or name.
        InvalidArgument: Several have; the message lists them.
    """
    found = _matches(text, pods, lambda pod: (pod.pod_sandbox_id, pod.name))
    if not found:
        raise NotFound(f"no pod has the id or name {text!r}", remedy="vmruntime list shows them")
    if len({(pod.namespace, pod.name) for pod in found}) > 1:
        candidates = ", ".join(f"{pod.name} ({short_id(pod.pod_sandbox_id)})" for pod in found)
        raise InvalidArgument(f"{text!r} may be any of: {candidates}", remedy="give more of the id")
    return found[-1]


def describe(item: cri_pb2.PodSandbox | cri_pb2.Container) -> str:
    """Return a pod's or container's name and short id."""
    return f"{item.metadata.name} ({short_id(item.id)})"


def pod_info(client: Client, pod_id: str) -> dict[str, Any]:
    """Return what the daemon tells of a pod beyond CRI; another runtime: nothing."""
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod_id, verbose=True)
    try:
        known = json.loads(client.call(client.runtime.PodSandboxStatus, request).info.get("info") or "{}")
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def pod_kinds(client: Client) -> dict[str, str]:
    """Return the kinds of pods (container, image, host) by id; of another runtime's pods: nothing."""
    try:
        pods = client.call(client.machines.ListPodKinds, maintenance_pb2.ListPodKindsRequest()).pods
    except Unimplemented:
        return {}
    return {pod.pod_sandbox_id: pod.kind for pod in pods}


def _matches(text: str, items: Sequence[T], key: Callable[[T], tuple[str, str]]) -> list[T]:
    """Return the items of that very id, else of that name, else whose id begins so."""
    for fits in (
        lambda id_, _: id_ == text,
        lambda _, name: name == text,
        lambda id_, _: bool(text) and id_.startswith(text),
    ):
        found = [item for item in items if fits(*key(item))]
        if found:
            return found
    return []


M = TypeVar("M", cri_pb2.PodSandbox, cri_pb2.Container, cri_pb2.PodSandbox | cri_pb2.Container)


def _only(text: str, found: Sequence[M], what: str, *, remedy: str = "give more of the id") -> M:
    if not found:
        raise NotFound(f"no {what} has the id or name {text!r}", remedy="vmruntime list shows them")
    if len(found) > 1:
        candidates = ", ".join(describe(item) for item in found)
        raise InvalidArgument(f"{text!r} may be any of: {candidates}", remedy=remedy)
    return found[0]
