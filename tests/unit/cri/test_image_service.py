from __future__ import annotations

import json

import grpc
import msgspec
import pytest

from tests.unit.cri.conftest import Rig
from tests.unit.cri.fakes import IMAGE_ID, make_image
from tests.unit.cri.test_runtime_service import refused
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated import maintenance_pb2 as own
from vmruntime.model.image import DiskImage, RegistryAuth

Code = grpc.StatusCode
NAME = "docker.io/library/busybox:1"


def spec(reference: str = NAME) -> cri.ImageSpec:
    return cri.ImageSpec(image=reference)


async def test_pull_returns_the_id_that_every_other_answer_repeats(rig: Rig) -> None:
    auth = cri.AuthConfig(username="u", password="p")
    answer = await rig.image.PullImage(cri.PullImageRequest(image=spec(), auth=auth))
    assert answer.image_ref == IMAGE_ID
    assert rig.images.pulled == [(NAME, RegistryAuth(username="u", password="p"))]
    status = await rig.image.ImageStatus(cri.ImageStatusRequest(image=spec(answer.image_ref)))
    assert status.image.id == IMAGE_ID
    assert not status.info


async def test_pull_without_credentials(rig: Rig) -> None:
    await rig.image.PullImage(cri.PullImageRequest(image=spec()))
    await rig.image.PullImage(cri.PullImageRequest(image=spec(), auth=cri.AuthConfig()))
    assert [auth for _, auth in rig.images.pulled] == [None, None]


async def test_pull_for_an_unknown_handler(rig: Rig) -> None:
    request = cri.PullImageRequest(image=cri.ImageSpec(image=NAME, runtime_handler="kata"))
    code, details = await refused(rig.image.PullImage(request))
    assert (code, "container, image, host" in details) == (Code.INVALID_ARGUMENT, True)


@pytest.mark.parametrize(
    ("handler", "of_image", "of_pod", "for_vm"),
    [
        ("", {}, {}, False),
        ("image", {}, {}, True),
        ("container", {}, {}, False),
        ("", {"vmruntime.io/kind": "image"}, {}, True),
        ("", {}, {"vmruntime.io/kind": "image"}, True),
        ("", {}, {"kubernetes.io/target-runtime": "virtlet.cloud"}, True),
        ("image", {"vmruntime.io/kind": "container"}, {}, False),
    ],
)
async def test_pull_for_an_image_pod(
    rig: Rig, handler: str, of_image: dict[str, str], of_pod: dict[str, str], for_vm: bool
) -> None:
    rig.images.translated = {NAME}
    image = cri.ImageSpec(image=NAME, runtime_handler=handler, annotations=of_image)
    request = cri.PullImageRequest(image=image, sandbox_config=cri.PodSandboxConfig(annotations=of_pod))
    await rig.image.PullImage(request)
    meant = f"virtlet.cloud/{NAME}" if for_vm else NAME
    assert (rig.images.pulled, rig.images.for_vms) == ([(meant, None)], [meant] if for_vm else [])


async def test_status_for_an_image_pod(rig: Rig) -> None:
    disk = DiskImage(digest=IMAGE_ID, format="qcow2", virtual_size=2**30, file_size=1000)
    image = msgspec.structs.replace(make_image(f"virtlet.cloud/{NAME}"), disk=disk)
    rig.images.found, rig.images.translated = [image], {NAME}
    request = cri.ImageStatusRequest(image=cri.ImageSpec(image=NAME, runtime_handler="image"), verbose=True)
    answer = await rig.image.ImageStatus(request)
    assert json.loads(answer.info["info"])["disk"] == {
        "digest": IMAGE_ID,
        "format": "qcow2",
        "virtual_size": 2**30,
        "file_size": 1000,
    }
    told = answer.image.spec
    assert (told.image, told.annotations["vmruntime.io/disk-format"], told.annotations["vmruntime.io/disk-size"]) == (
        image.id,
        "qcow2",
        "1073741824",
    )
    assert not (await rig.image.ImageStatus(cri.ImageStatusRequest(image=spec()))).HasField("image")


async def test_maintenance(rig: Rig) -> None:
    rig.images.found = [make_image(), make_image("docker.io/library/other:1", image_id="sha256:" + "cd" * 32)]
    uses = (await rig.maintenance.ListImageUse(own.ListImageUseRequest())).images
    assert [(use.id, use.last_used_at, use.in_use) for use in uses] == [
        (IMAGE_ID, 0, True),
        ("sha256:" + "cd" * 32, 0, False),
    ]
    answer = await rig.maintenance.PruneImages(own.PruneImagesRequest(unused_seconds=60, dry_run=True))
    assert rig.images.pruned == [(60.0, True)]
    assert [list(image.repo_tags) for image in answer.images] == [[NAME], ["docker.io/library/other:1"]]
    assert answer.freed_bytes == 7
    code, details = await refused(rig.maintenance.PruneImages(own.PruneImagesRequest(unused_seconds=-1)))
    assert (code, "unused_seconds" in details) == (Code.INVALID_ARGUMENT, True)


async def test_status(rig: Rig) -> None:
    rig.images.found = [make_image()]
    answer = await rig.image.ImageStatus(cri.ImageStatusRequest(image=spec(), verbose=True))
    assert (answer.image.id, answer.image.size, list(answer.image.repo_tags)) == (IMAGE_ID, 1000, [NAME])
    assert not answer.image.HasField("uid")
    assert json.loads(answer.info["info"])["imageSpec"]["config"]["Entrypoint"] == ["/bin/sh"]


async def test_status_of_a_missing_image_is_an_empty_answer(rig: Rig) -> None:
    answer = await rig.image.ImageStatus(cri.ImageStatusRequest(image=spec("nothing")))
    assert not answer.HasField("image")


@pytest.mark.parametrize(
    ("user", "uid", "username"),
    [("", None, ""), ("1000", 1000, ""), ("1000:50", 1000, ""), ("web:www", None, "web"), ("9" * 30, None, "9" * 30)],
)
async def test_user(rig: Rig, user: str, uid: int | None, username: str) -> None:
    rig.images.found = [make_image(user=user)]
    image = (await rig.image.ImageStatus(cri.ImageStatusRequest(image=spec()))).image
    assert (image.uid.value if image.HasField("uid") else None, image.username) == (uid, username)


async def test_list_stream_and_filter(rig: Rig) -> None:
    rig.images.found = [make_image(), make_image("other:1", image_id="sha256:" + "12" * 32)]
    assert len((await rig.image.ListImages(cri.ListImagesRequest())).images) == 2
    wanted = cri.ImageFilter(image=spec("other:1"))
    listed = (await rig.image.ListImages(cri.ListImagesRequest(filter=wanted))).images
    assert [image.repo_tags[0] for image in listed] == ["other:1"]
    streamed = [piece async for piece in rig.image.StreamImages(cri.StreamImagesRequest(filter=wanted))]
    assert [image for piece in streamed for image in piece.images] == list(listed)
    missing = cri.ImageFilter(image=spec("nothing"))
    assert not (await rig.image.ListImages(cri.ListImagesRequest(filter=missing))).images
    assert [p async for p in rig.image.StreamImages(cri.StreamImagesRequest(filter=missing))] == []


async def test_remove_is_idempotent(rig: Rig) -> None:
    rig.images.found = [make_image()]
    for _ in range(2):
        await rig.image.RemoveImage(cri.RemoveImageRequest(image=spec()))
    assert rig.images.found == []


async def test_fs_info(rig: Rig) -> None:
    answer = await rig.image.ImageFsInfo(cri.ImageFsInfoRequest())
    (usage,) = answer.image_filesystems
    assert (usage.used_bytes.value, usage.inodes_used.value) == (4096, 7)
    assert (usage.fs_id.mountpoint, usage.timestamp > 0) == ("/var/lib/vmruntime/layers", True)


@pytest.mark.parametrize("method", ["PullImage", "ImageStatus", "RemoveImage"])
async def test_missing_fields_are_named(rig: Rig, method: str) -> None:
    request = getattr(cri, f"{method}Request")
    call = getattr(rig.image, method)
    assert await refused(call(request())) == (Code.INVALID_ARGUMENT, "image is required")
    assert await refused(call(request(image=cri.ImageSpec()))) == (Code.INVALID_ARGUMENT, "image.image is required")


async def test_credentials_that_cannot_be_are_refused_unseen(rig: Rig) -> None:
    request = cri.PullImageRequest(image=spec(), auth=cri.AuthConfig(password="hidden\0secret"))
    code, details = await refused(rig.image.PullImage(request))
    assert (code, "hidden" in details, "auth.password" in details) == (Code.INVALID_ARGUMENT, False, True)
