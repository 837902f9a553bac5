"""The hooks of one container: which match, and what becomes of those that a VM cannot run (adr/0004)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, get_args

import structlog

from vmruntime.agent.errors import AgentError
from vmruntime.errors import FailedPrecondition
from vmruntime.model.container import Container
from vmruntime.model.sandbox import Sandbox, SandboxKind
from vmruntime.pods.context import Context
from vmruntime.pods.oci.hooks import IN_CONTAINER, Hook, Stage, Subject, matches, oci_hooks, outside

log = structlog.get_logger(__name__)

KIND_ANNOTATION = "vmruntime.io/kind"
OUTPUT_LIMIT = 500


async def add_hooks(context: Context, sandbox: Sandbox, container: Container, oci_spec: dict[str, Any]) -> None:
    """Put the hooks that match a container into its configuration.

    Raises:
        FailedPrecondition: A hook file cannot be used, or a hook is for the host and the container is in a VM.
    """
    hooks = await asyncio.to_thread(context.hooks.load)
    identity = _identity(sandbox, container)
    subject = Subject(
        # Pods' annotations count for conditions and go no further: crun obeys some of them.
        annotations={**sandbox.spec.annotations, **container.spec.annotations, **identity},
        program=oci_spec["process"]["args"][0],
        bind_mounts=any(not mount.image for mount in container.spec.mounts),
    )
    found = [hook for hook in hooks if matches(hook, subject)]
    stages: tuple[Stage, ...] = get_args(Stage)
    if sandbox.spec.kind is not SandboxKind.HOST:
        _tell_unfit(context, container, found)
        stages = (IN_CONTAINER,)
    if member := _joined(container.edits.hooks, oci_hooks(found, stages)):
        oci_spec["hooks"] = member
        output = {}
        if sandbox.spec.kind is SandboxKind.HOST:
            # Two features of crun; otherwise what hooks write is lost.
            path = str(context.hook_output(sandbox.id))
            output = {"run.oci.hooks.stdout": path, "run.oci.hooks.stderr": path}
        oci_spec["annotations"] = {**oci_spec["annotations"], **identity, **output}
        log.info("hooks", container=container.id, stages={stage: len(entries) for stage, entries in member.items()})


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return two members "hooks" as one; those of devices come first."""
    return {stage: [*one.get(stage, []), *other.get(stage, [])] for stage in {**one, **other}}


async def told_hook(context: Context, container: Container, error: AgentError) -> AgentError:
    """Return an agent's error with what a hook wrote, if one failed (crun's words: "error executing hook")."""
    if "executing hook" not in error.message:
        return error
    said = await asyncio.to_thread(_tail, context.hook_output(container.sandbox_id))
    message = f"{error.message}; the hooks of this pod last said: {said}" if said else error.message
    return AgentError(message, error.code)


def _tail(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - OUTPUT_LIMIT))
            return opened.read(OUTPUT_LIMIT).decode(errors="replace").strip()
    except OSError:
        return ""


def _identity(sandbox: Sandbox, container: Container) -> dict[str, str]:
    """Return what hooks can know a container by, beside its own annotations."""
    metadata = sandbox.spec.metadata
    return {
        KIND_ANNOTATION: sandbox.spec.kind.value,
        "io.kubernetes.pod.name": metadata.name,
        "io.kubernetes.pod.namespace": metadata.namespace,
        "io.kubernetes.pod.uid": metadata.uid,
        "io.kubernetes.container.name": container.spec.metadata.name,
    }


def _tell_unfit(context: Context, container: Container, hooks: list[Hook]) -> None:
    """Refuse hooks of the host for a container in a VM, or say that they are skipped.

    Raises:
        FailedPrecondition: There is one, and it is not to be skipped.
    """
    for hook in hooks:
        if not (stages := outside(hook)):
            continue
        if not context.hooks.skip_in_vms:
            raise FailedPrecondition(
                f"the hook {hook.file} ({', '.join(stages)}) matches this container, which is in a VM, where a program of"
                " the host cannot run",
                remedy=f'give it the condition "annotations": {{"^{KIND_ANNOTATION}$": "^host$"}}, run the pod as a'
                ' host pod, or set hooks_in_vms = "skip"',
            )
        log.warning("hook skipped: its container is in a VM", hook=hook.file, stages=stages, container=container.id)
