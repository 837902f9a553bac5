"""What a container brings into its sandbox, layers, volumes and devices, goes with the last container that has it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.support.fakes import make_image
from tests.unit.pods.bed import Daemon
from vmruntime.agent.errors import AgentError
from vmruntime.errors import Code, Internal, NotFound
from vmruntime.model.container import ContainerState, Device, Mount

A, B, C = (letter * 32 for letter in "abc")
"""Layers: the image busybox has A and B, data has B and C."""

DATA = Mount(container_path="/data", image="docker.io/library/data:1")


def binds(daemon: Daemon, pod: str, container: str) -> dict[str, str]:
    """Return the sources of a container's mounts by destination, as the guest was told of them."""
    request = daemon.machine(pod).guest.containers[container].request
    return {
        mount["destination"]: mount["source"]
        for mount in json.loads(request.oci_spec)["mounts"]
        if mount["source"].partition(":")[0] in ("share", "image", "memory")
    }


async def test_layers_go_with_the_last_container_that_has_them(daemon: Daemon, pod: str) -> None:
    machine = daemon.machine(pod)
    first = await daemon.create(pod, name="first")
    second = await daemon.create(pod, name="second", image="docker.io/library/data:1")
    assert machine.layers == {A, B, C}
    assert machine.guest.containers[second].request.layer_serials == [B, C]
    await daemon.pods.remove_container(first)
    assert machine.layers == {B, C}
    await daemon.pods.remove_container(second)
    daemon.pod_as_new(pod)


async def test_an_image_volume_goes_with_its_container(daemon: Daemon, pod: str) -> None:
    machine = daemon.machine(pod)
    part = Mount(container_path="/part", image="docker.io/library/data:1", image_sub_path="etc")
    container = await daemon.create(pod, mounts=[DATA, part])
    assert machine.layers == {A, B, C}
    assert machine.guest.containers[container].request.image_volumes == [[B, C], [B, C]]
    assert binds(daemon, pod, container) == {"/data": "image:0", "/part": "image:1/etc"}
    # A removal of the image leaves these layers on the disk.
    assert {layer[7] for layer in daemon.pods.container(container).layers} == {"a", "b", "c"}
    await daemon.pods.remove_container(container)
    daemon.pod_as_new(pod)


async def test_an_image_volume_stays_while_another_container_has_its_layers(daemon: Daemon, pod: str) -> None:
    machine = daemon.machine(pod)
    reader = await daemon.create(pod, name="reader", mounts=[DATA])
    other = await daemon.create(pod, name="other", image="docker.io/library/data:1")
    await daemon.pods.remove_container(reader)
    assert machine.layers == {B, C}
    await daemon.pods.start_container(other)
    await daemon.pods.remove_container(other)
    daemon.pod_as_new(pod)


async def test_an_image_volume_that_is_not_there(daemon: Daemon, pod: str) -> None:
    mounts = [DATA, Mount(container_path="/x", image="no/where:1")]
    with pytest.raises(NotFound, match=r"config\.mounts\[1\]\.image: 'no/where:1' is not on this host"):
        await daemon.create(pod, mounts=mounts)
    daemon.pod_as_new(pod)


async def test_a_layer_that_another_container_is_about_to_use_stays(daemon: Daemon, pod: str) -> None:
    """The guest lets go of it when the first container goes; the second one was told already that it is plugged in."""
    first = await daemon.create(pod, name="first")
    create = daemon.faults.hold("agent.create")
    making = asyncio.ensure_future(daemon.create(pod, name="second"))
    await create.reached.wait()
    await daemon.pods.remove_container(first)
    create.release()
    second = await making
    assert daemon.machine(pod).layers == {A, B}
    await daemon.pods.remove_container(second)
    daemon.pod_as_new(pod)


@pytest.mark.parametrize("known", [False, True])
async def test_a_failed_creation_leaves_nothing_plugged_in(
    daemon: Daemon, pod: str, tmp_path: Path, known: bool
) -> None:
    """Whether or not the guest had made the container when the failure came."""
    kept = await daemon.create(pod, name="kept")
    daemon.faults.fail("agent.create done" if known else "agent.create", AgentError("scratch is full", Code.INTERNAL))
    device = Device(container_path="/dev/x", host_path="/dev/loop9", permissions="rw")
    mounts = [DATA, Mount(container_path="/v", host_path=str(tmp_path))]
    with pytest.raises(AgentError, match="scratch is full"):
        await daemon.create(pod, mounts=mounts, devices=[device])
    machine = daemon.machine(pod)
    assert (machine.layers, machine.volumes, machine.devices) == ({A, B}, {}, set())
    assert list(machine.guest.containers) == [kept]


async def test_a_container_whose_command_is_missing_leaves_nothing(daemon: Daemon, pod: str, tmp_path: Path) -> None:
    mounts = [DATA, Mount(container_path="/v", host_path=str(tmp_path))]
    missing = await daemon.create(pod, "no-such-program", mounts=mounts)
    await daemon.pods.remove_container(missing)
    daemon.pod_as_new(pod)


async def test_mounts_keep_their_order_and_flags(daemon: Daemon, pod: str, tmp_path: Path) -> None:
    mounts = [
        Mount(container_path="/one", host_path=str(tmp_path), readonly=True),
        DATA,
        Mount(container_path="/one/two", host_path=str(tmp_path)),
    ]
    container = await daemon.create(pod, mounts=mounts)
    assert list(binds(daemon, pod, container).items()) == [
        ("/one", f"share:{container}/0"),
        ("/data", "image:0"),
        ("/one/two", f"share:{container}/1"),
    ]
    request = daemon.machine(pod).guest.containers[container].request
    assert request.share_tag == "vmruntime"
    options = {mount["destination"]: mount["options"] for mount in json.loads(request.oci_spec)["mounts"]}
    assert ["ro" in options[path] for path in ("/one", "/data", "/one/two")] == [True, True, False]
    assert daemon.machine(pod).volumes == {container: [mounts[0], mounts[2]]}
    await daemon.pods.remove_container(container)
    daemon.pod_as_new(pod)


async def test_a_device_goes_with_the_last_container_that_has_it(daemon: Daemon, pod: str) -> None:
    def device(path: str) -> Device:
        return Device(container_path="/dev/x", host_path=path, permissions="rw")

    shared, own = device("/dev/loop8"), device("/dev/loop9")
    first = await daemon.create(pod, name="first", devices=[shared, own])
    second = await daemon.create(pod, name="second", devices=[device("/dev/disk/../loop8")])  # another name of it
    machine = daemon.machine(pod)
    await daemon.pods.remove_container(first)
    assert machine.devices == {"/dev/loop8"}
    await daemon.pods.remove_container(second)
    daemon.pod_as_new(pod)


@pytest.mark.parametrize("step", ["release_layers", "withdraw_volumes", "release_devices"])
async def test_what_cannot_be_taken_away_is_tried_again(daemon: Daemon, pod: str, tmp_path: Path, step: str) -> None:
    device = Device(container_path="/dev/x", host_path="/dev/loop9", permissions="rw")
    mounts = [DATA, Mount(container_path="/v", host_path=str(tmp_path))]
    container = await daemon.run(pod, mounts=mounts, devices=[device])
    daemon.faults.fail(f"sandbox.{step}", Internal("it is busy"))
    with pytest.raises(Internal, match="it is busy"):
        await daemon.pods.remove_container(container)
    assert daemon.pods.container(container).state is ContainerState.REMOVING
    await daemon.pods.remove_container(container)
    daemon.pod_as_new(pod)


async def test_images_are_noted_as_used(daemon: Daemon, pod: str) -> None:
    image = daemon.world.images.add(make_image("third", "d"))
    sweeps = daemon.world.images.sweeps
    container = await daemon.create(pod, image=image.id)
    assert daemon.world.images.touched == [image.id]
    await daemon.pods.remove_container(container)
    assert daemon.world.images.sweeps > sweeps  # what the image's removal had to leave
