from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
import structlog.testing

from tests.unit.cri.conftest import Rig
from tests.unit.cri.test_runtime_service import refused
from vmruntime import errors
from vmruntime.generated import cri_pb2 as cri

SECRETS = ("s3cret-pass", "s3cret-auth", "s3cret-identity", "s3cret-registry")


def every_error() -> list[type[errors.VmruntimeError]]:
    # Of that module alone: parts have subclasses of their own, with other arguments.
    return [one for one in errors.VmruntimeError.__subclasses__() if one.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", every_error())
async def test_every_error_has_its_status(rig: Rig, kind: type[errors.VmruntimeError]) -> None:
    rig.pods.fail = kind("what", remedy="do that")
    code, details = await refused(rig.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id="f" * 64)))
    assert (code.name, details) == (kind.code.name, "what (do that)")


async def test_a_defect_is_internal_with_a_number_found_in_the_log(rig: Rig) -> None:
    rig.pods.fail = ZeroDivisionError("the inner cause")
    with structlog.testing.capture_logs() as logs:
        code, details = await refused(rig.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id="f" * 64)))
    assert code is grpc.StatusCode.INTERNAL
    assert "inner cause" not in details
    number = details.split()[2].rstrip(";")
    (entry,) = [one for one in logs if one["log_level"] == "error"]
    assert number in entry["details"]
    assert "ZeroDivisionError: the inner cause" in entry["details"]
    assert "Traceback" in entry["details"]


@pytest.mark.parametrize("kind", [errors.Unavailable, RuntimeError])
async def test_credentials_reach_neither_log_nor_client(rig: Rig, kind: type[Exception]) -> None:
    auth = cri.AuthConfig(
        username="someone", password=SECRETS[0], auth=SECRETS[1], identity_token=SECRETS[2], registry_token=SECRETS[3]
    )
    rig.images.fail = kind(f"skopeo said: {' '.join(SECRETS)}")
    request = cri.PullImageRequest(image=cri.ImageSpec(image="busybox"), auth=auth)
    with structlog.testing.capture_logs() as logs:
        _, details = await refused(rig.image.PullImage(request))
    assert logs
    for secret in SECRETS:
        assert secret not in details
        assert secret not in str(logs)


async def test_calls_are_logged_with_duration_and_ids(rig: Rig) -> None:
    seen: list[dict[str, Any]] = []

    def keep(logger: object, name: str, event: Any) -> Any:
        seen.append(dict(event))
        raise structlog.DropEvent

    before = structlog.get_config()["processors"]
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, keep])
    try:
        await rig.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id="e" * 64))
        await rig.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id="d" * 64))
    finally:
        structlog.configure(processors=before)
    first, second = (one for one in seen if one["event"] == "cri call done")
    assert (first["method"], first["pod"], "container" in first) == ("StopPodSandbox", "e" * 64, False)
    assert (second["method"], second["container"], "pod" in second) == ("RemoveContainer", "d" * 64, False)
    assert first["duration_ms"] >= 0


async def test_a_message_that_is_not_one(rig: Rig) -> None:
    async with grpc.aio.insecure_channel(f"unix:{rig.socket}") as channel:
        call = channel.unary_unary("/runtime.v1.RuntimeService/Version")
        code, details = await refused(call(b"\xff\xff\xff"))
    assert (code, "not a valid message" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_an_unknown_method(rig: Rig) -> None:
    async with grpc.aio.insecure_channel(f"unix:{rig.socket}") as channel:
        call = channel.unary_unary("/runtime.v1.RuntimeService/NoSuchMethod")
        assert (await refused(call(b"")))[0] is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("text", ["x" * 100_000, "ж" * 100_000, "line\nline", "\udcff"])
async def test_any_message_can_be_told(rig: Rig, text: str) -> None:
    rig.pods.fail = errors.Unavailable(text)
    code, details = await refused(rig.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id="f" * 64)))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert len(details) < 3000


async def test_a_caller_that_goes_away_cancels_the_call(rig: Rig) -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def forever(sandbox_id: str) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    rig.pods.stop_sandbox = forever  # type: ignore[method-assign]
    call = rig.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id="f" * 64))
    waiting = asyncio.ensure_future(call)
    await asyncio.wait_for(entered.wait(), 5)
    call.cancel()
    await asyncio.wait_for(cancelled.wait(), 5)
    with pytest.raises(asyncio.CancelledError):
        await waiting
