"""Filters of lists. Everything a filter names must match; ids match by prefix; an empty filter matches all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from vmruntime.cri.translate import container as containers
from vmruntime.cri.translate import sandbox as sandboxes
from vmruntime.cri.translate.checks import bad, text
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import Container
from vmruntime.model.sandbox import Sandbox


def filter_sandboxes(message: cri.PodSandboxFilter, found: Iterable[Sandbox]) -> list[Sandbox]:
    """Return the sandboxes that match, oldest first.

    Raises:
        InvalidArgument: The filter's state is unknown.
    """
    text("filter.id", message.id)
    tests: list[Callable[[Sandbox], bool]] = []
    if message.HasField("state"):
        state = message.state.state
        if state not in (cri.SANDBOX_READY, cri.SANDBOX_NOTREADY):
            raise bad("filter.state.state", int(state), "is not a known sandbox state")
        tests.append(lambda sandbox: sandboxes.state_to_cri(sandbox.state) == state)
    if message.id:
        tests.append(lambda sandbox: sandbox.id.startswith(message.id))
    if message.label_selector:
        tests.append(lambda sandbox: labels_match(message.label_selector, sandbox.spec.labels))
    matching = [sandbox for sandbox in found if all(test(sandbox) for test in tests)]
    return sorted(matching, key=lambda sandbox: (sandbox.created_at, sandbox.id))


def filter_containers(
    message: cri.ContainerFilter | cri.ContainerStatsFilter, found: Iterable[Container]
) -> list[Container]:
    """Return the containers that match, oldest first. The statistics' filter is the same but for the state.

    Raises:
        InvalidArgument: The filter's state is unknown.
    """
    text("filter.id", message.id)
    text("filter.pod_sandbox_id", message.pod_sandbox_id)
    tests: list[Callable[[Container], bool]] = []
    if isinstance(message, cri.ContainerFilter) and message.HasField("state"):
        state = message.state.state
        if state not in cri.ContainerState.values():
            raise bad("filter.state.state", int(state), "is not a known container state")
        tests.append(lambda container: containers.state_to_cri(container.state) == state)
    if message.id:
        tests.append(lambda container: container.id.startswith(message.id))
    if message.pod_sandbox_id:
        tests.append(lambda container: container.sandbox_id.startswith(message.pod_sandbox_id))
    if message.label_selector:
        tests.append(lambda container: labels_match(message.label_selector, container.spec.labels))
    matching = [container for container in found if all(test(container) for test in tests)]
    return sorted(matching, key=lambda container: (container.created_at, container.id))


def labels_match(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether every label of the selector is there with the same value."""
    return all(labels.get(key) == value for key, value in selector.items())
