"""The whole daemon over its socket, with guests and network in memory: pods, a restart, the lock, readiness."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
import subprocess
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from tests.unit.daemon.serving import PATIENCE, exited, pod_config, put_image, serving, start
from vmruntime.config.settings import ImageSettings, LogSettings, Settings
from vmruntime.daemon.lock import only_daemon
from vmruntime.daemon.main import serve
from vmruntime.daemon.parts import Parts
from vmruntime.errors import FailedPrecondition
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated import cri_pb2_grpc, maintenance_pb2_grpc
from vmruntime.generated import maintenance_pb2 as own
from vmruntime.hypervisor.fake import FakeHypervisor
from vmruntime.network.errors import NetworkError
from vmruntime.paths import Paths
from vmruntime.pods import network_care


async def test_a_pod_from_start_to_removal(settings: Settings, parts: Parts) -> None:
    image = await put_image(settings)
    async with serving(settings, parts) as stub:
        pod, container = await start(stub, settings, image, "echo hello; exit 3")
        status = await exited(stub, container)
        assert (status.exit_code, status.reason) == (3, "Error")
        assert Path(settings.root, "logs", "app.log").read_text().endswith("stdout F hello\n")
        (listed,) = (await stub.ListPodSandbox(cri.ListPodSandboxRequest())).items
        assert (listed.id, listed.state) == (pod, cri.SANDBOX_READY)
        await stub.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
        await stub.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
        assert not (await stub.ListPodSandbox(cri.ListPodSandboxRequest())).items
        assert parts.network is not None
        assert parts.network.attached == {}  # type: ignore[attr-defined]
        assert list(Path(settings.run, "sandboxes").iterdir()) == []


async def test_vms_may_pass_to_their_disks_and_find_nothing_else(settings: Settings, parts: Parts) -> None:
    paths = Paths(root=Path(settings.root), run=Path(settings.run))
    paths.incoming.mkdir(parents=True, mode=0o755)  # as an earlier version may have left it, in a closed directory
    async with serving(settings, parts):
        modes = {path: path.stat().st_mode & 0o777 for path in (paths.root, *paths.root.iterdir())}
    passed = {paths.root, paths.disks, paths.pods, paths.sandboxes}
    assert {mode for path, mode in modes.items() if path in passed} == {0o711}
    assert {path.name for path, mode in modes.items() if path not in passed and mode & 0o007} == set()
    assert {paths.database, paths.layers, paths.incoming, paths.downloads, paths.cni_cache, paths.disks} <= set(modes)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "vm.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1G"], check=True)
    return path


async def test_an_image_of_a_vm(settings: Settings, parts: Parts, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "images.d").mkdir()
    rules = json.dumps({"translations": [{"name": "vm", "url": disk.as_uri()}]})
    (tmp_path / "images.d" / "rules.json").write_text(rules)
    me = pwd.getpwuid(os.geteuid()).pw_name
    settings = msgspec.structs.replace(
        settings,
        images=ImageSettings(translations_dir=str(tmp_path / "images.d")),
        hypervisor=msgspec.structs.replace(settings.hypervisor, user=me),
    )
    async with serving(settings, parts), grpc.aio.insecure_channel(f"unix:{settings.run}/vmruntime.sock") as to:
        stub: Any = cri_pb2_grpc.ImageServiceStub(to)
        annotations = {"vmruntime.io/kind": "image"}
        pod = cri.PodSandboxConfig(annotations=annotations)
        spec = cri.ImageSpec(image="vm:1", annotations=annotations)  # as kubelet asks
        assert not (await stub.ImageStatus(cri.ImageStatusRequest(image=spec))).HasField("image")
        pulled = await stub.PullImage(cri.PullImageRequest(image=spec, sandbox_config=pod))
        answer = await stub.ImageStatus(cri.ImageStatusRequest(image=spec, verbose=True))
        assert (answer.image.id, list(answer.image.repo_tags)) == (pulled.image_ref, ["virtlet.cloud/vm:1"])
        assert json.loads(answer.info["info"])["disk"]["virtual_size"] == 2**30
        (listed,) = (await stub.ListImages(cri.ListImagesRequest())).images
        assert listed.spec.annotations["vmruntime.io/disk-format"] == "qcow2"
        (usage,) = (await stub.ImageFsInfo(cri.ImageFsInfoRequest())).image_filesystems
        assert usage.used_bytes.value == listed.size == disk.stat().st_size
        disk.write_bytes(b"<html>")
        with pytest.raises(grpc.aio.AioRpcError, match="virtlet.cloud/vm:1: is a web page"):
            await stub.PullImage(cri.PullImageRequest(image=spec, sandbox_config=pod))
        await stub.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=listed.id)))
        assert list(Path(settings.root, "disks").iterdir()) == []


async def test_images_of_containers_are_not_pruned(settings: Settings, parts: Parts) -> None:
    image = await put_image(settings)
    everything = own.PruneImagesRequest(unused_seconds=0)
    async with serving(settings, parts) as stub, grpc.aio.insecure_channel(f"unix:{settings.run}/vmruntime.sock") as to:
        maintenance = maintenance_pb2_grpc.ImageMaintenanceStub(to)
        pod, container = await start(stub, settings, image, "exit 0")
        await exited(stub, container)
        assert not (await maintenance.PruneImages(everything)).images
        (use,) = (await maintenance.ListImageUse(own.ListImageUseRequest())).images
        assert use.in_use
        await stub.RemoveContainer(cri.RemoveContainerRequest(container_id=container))
        (after,) = (await maintenance.ListImageUse(own.ListImageUseRequest())).images
        assert (after.in_use, after.last_used_at > use.last_used_at) == (False, True)
        assert not (await maintenance.PruneImages(own.PruneImagesRequest(unused_seconds=3600))).images
        config = pod_config(settings, "web")
        volume = cri.Mount(container_path="/data", image=cri.ImageSpec(image=image.id), readonly=True)
        second = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="second"),
            image=cri.ImageSpec(image=image.id),
            command=["/bin/sh", "-c", "exit 0"],
            mounts=[volume],
            linux=cri.LinuxContainerConfig(),
        )
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=second, sandbox_config=config)
        await stub.CreateContainer(request)
        assert not (await maintenance.PruneImages(everything)).images
        await stub.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
        assert [one.id for one in (await maintenance.PruneImages(everything)).images] == [image.id]
        assert list(Path(settings.root, "layers").iterdir()) == []


async def test_old_images_go_by_themselves_when_asked_for(settings: Settings, parts: Parts) -> None:
    image = await put_image(settings)
    (layer,) = (Path(settings.root, "layers", f"{one.diff_id[7:]}.erofs") for one in image.layers)
    async with serving(settings, parts):
        assert layer.exists()  # off by default
    settings = msgspec.structs.replace(settings, images=ImageSettings(prune_after_days=30.0))
    async with serving(settings, parts):
        async with asyncio.timeout(PATIENCE):
            while layer.exists():
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("mode", ["refuse", "skip"])
async def test_a_hook_of_the_host_and_a_vm(settings: Settings, parts: Parts, tmp_path: Path, mode: str) -> None:
    image = await put_image(settings)
    hook = {"version": "1.0.0", "hook": {"path": "/bin/true"}, "when": {"always": True}, "stages": ["prestart"]}
    (tmp_path / "h.json").write_text(json.dumps(hook))
    settings = msgspec.structs.replace(settings, hooks_dirs=[str(tmp_path)], hooks_in_vms=mode)
    async with serving(settings, parts) as stub:
        if mode == "skip":
            _, container = await start(stub, settings, image, "exit 3")
            assert (await exited(stub, container)).exit_code == 3
        else:
            with pytest.raises(grpc.RpcError, match=r"h\.json \(prestart\) matches this container, which is in a VM"):
                await start(stub, settings, image, "exit 3")
            assert not (await stub.ListContainers(cri.ListContainersRequest())).containers
        for pod in (await stub.ListPodSandbox(cri.ListPodSandboxRequest())).items:
            await stub.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


async def test_the_next_daemon_finds_the_pods_and_their_output(settings: Settings, parts: Parts) -> None:
    image = await put_image(settings)
    async with serving(settings, parts) as stub:
        pod, container = await start(stub, settings, image, "echo one; sleep 0.3; echo two; exit 4")
    await asyncio.sleep(0.5)  # it writes and exits while no daemon is there
    async with serving(settings, parts) as stub:
        assert (await exited(stub, container)).exit_code == 4
        log = Path(settings.root, "logs", "app.log").read_text().splitlines()
        assert [line.rpartition(" ")[2] for line in log] == ["one", "two"]
        await stub.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))


async def test_a_pod_that_died_meanwhile_is_not_ready(settings: Settings, parts: Parts) -> None:
    image = await put_image(settings)
    async with serving(settings, parts) as stub:
        pod, container = await start(stub, settings, image, "sleep 1000")
    assert isinstance(parts.hypervisor, FakeHypervisor)
    await parts.hypervisor.machines[pod].crash()
    async with serving(settings, parts) as stub:
        assert (await exited(stub, container)).exit_code == 255
        status = (await stub.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))).status
        assert status.state == cri.SANDBOX_NOTREADY
        await stub.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))


async def test_the_next_daemon_looks_after_networks(
    settings: Settings, parts: Parts, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody owns is released, what is not as it was made is told, in the log and in a verbose status."""
    settings = msgspec.structs.replace(settings, log=LogSettings(level="warning"))
    network: Any = parts.network

    async def told(stub: Any) -> str:
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
        return str(json.loads((await stub.PodSandboxStatus(request)).info["info"])["network_check"])

    async with serving(settings, parts) as stub:
        config = pod_config(settings, "web")
        pod = (await stub.RunPodSandbox(cri.RunPodSandboxRequest(config=config))).pod_sandbox_id
        assert await told(stub) == "as it was made"
    network.attached["f" * 64] = "10.88.0.99"
    network.faults.fail("network.check", NetworkError("the bridge is gone"))
    async with serving(settings, parts) as stub:
        assert set(network.attached) == {pod}
        async with asyncio.timeout(PATIENCE):
            while "the bridge is gone" not in (said := capfd.readouterr().err):
                await asyncio.sleep(0.01)
        assert "a pod's network is not as it was made" in said
        assert await told(stub) == "as it was made"
        network.faults.fail("network.check", NetworkError("the route is gone"))
        assert await told(stub) == "the route is gone"
        await stub.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
        assert await told(stub) == "not checked"
        await stub.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    network.faults.fail("network.collect", NetworkError("the plugins are gone"))
    async with serving(settings, parts) as stub:
        await stub.Version(cri.VersionRequest())
    assert "networks nobody owns may be left" in capfd.readouterr().err
    monkeypatch.setattr(network_care, "COLLECT_SECONDS", 0.1)
    network.faults.delay("network.collect", 3600)
    async with serving(settings, parts) as stub:
        await stub.Version(cri.VersionRequest())
    assert "not done within 0.1 s" in capfd.readouterr().err


async def test_two_daemons_do_not_share_directories(settings: Settings, parts: Parts) -> None:
    async with serving(settings, parts) as stub:
        with pytest.raises(FailedPrecondition, match="another vmruntime daemon uses"):
            with only_daemon(Paths(run=Path(settings.run)).lock):
                pass
        assert (await stub.Version(cri.VersionRequest())).runtime_name == "vmruntime"


async def test_status_says_what_is_missing(settings: Settings, parts: Parts) -> None:
    async with serving(settings, parts) as stub:
        ready = {one.type: one.status for one in (await stub.Status(cri.StatusRequest())).status.conditions}
        assert ready == {"RuntimeReady": True, "NetworkReady": True}
        Path(settings.guest.directory, "initramfs.img").unlink()
        conditions = {one.type: one for one in (await stub.Status(cri.StatusRequest())).status.conditions}
        assert (conditions["RuntimeReady"].status, conditions["RuntimeReady"].reason) == (False, "GuestMissing")
        assert "initramfs.img is missing" in conditions["RuntimeReady"].message


async def test_a_service_manager_is_told(
    settings: Settings, parts: Parts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + f"vmruntime-test-{os.getpid()}")
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@vmruntime-test-{os.getpid()}")
        async with serving(settings, parts):
            assert manager.recv(64) == b"READY=1"
            with pytest.raises(BlockingIOError):
                manager.recv(64)
        assert manager.recv(64) == b"STOPPING=1"


async def test_directories_that_cannot_be_made(settings: Settings, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = msgspec.structs.replace(settings, run=str(tmp_path / "file" / "run"))
    with pytest.raises(FailedPrecondition, match=r"file/run cannot be made: Not a directory"):
        await serve(bad, parts)
