"""What Prometheus finds at a daemon with guests in memory."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.request

import msgspec
import pytest

from tests.unit.daemon.serving import PATIENCE, exited, put_image, serving, start
from vmruntime import __version__
from vmruntime.config.settings import MetricsSettings, Settings
from vmruntime.daemon.parts import Parts
from vmruntime.errors import Unavailable
from vmruntime.generated import cri_pb2 as cri
from vmruntime.hypervisor.fake import FakeHypervisor


class Scraper:
    """Reads samples; counters go on from what other tests of this process did, so differences count."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])

    async def samples(self) -> dict[str, float]:
        url = f"http://127.0.0.1:{self.port}/metrics"
        text = (await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read())).decode()
        return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)}


async def test_a_life_in_numbers(settings: Settings, parts: Parts) -> None:
    image = await put_image(settings)
    scraper = Scraper()
    settings = msgspec.structs.replace(settings, metrics=MetricsSettings(address="127.0.0.1", port=scraper.port))
    starts = 'vmruntime_sandbox_start_seconds_count{phase="%s"}'
    call = 'vmruntime_cri_operation_seconds_count{code="%s",method="%s"}'
    async with serving(settings, parts) as stub:
        before = await scraper.samples()

        async def counted(name: str) -> float:
            return (await scraper.samples()).get(name, 0) - before.get(name, 0)

        pod, container = await start(stub, settings, image, "exit 3")
        await exited(stub, container)
        for phase in ("prepare", "qemu", "guest", "cni", "setup", "total"):
            assert await counted(starts % phase) == 1, phase
        for method in ("RunPodSandbox", "CreateContainer", "StartContainer"):
            assert await counted(call % ("OK", method)) == 1, method
        now = await scraper.samples()
        assert now['vmruntime_pods{state="ready"}'] == 1
        assert now['vmruntime_containers{state="exited"}'] == 1
        assert (now["vmruntime_images"], now["vmruntime_image_bytes"]) == (1, 4096)
        (info,) = (name for name in now if name.startswith("vmruntime_info"))
        assert f'version="{__version__}"' in info
        assert 'accelerator="' in info
        assert now["process_open_fds"] > 0
        deaths = now["vmruntime_sandbox_deaths_total"]
        assert isinstance(parts.hypervisor, FakeHypervisor)
        await parts.hypervisor.machines[pod].crash()
        async with asyncio.timeout(PATIENCE):
            while (await scraper.samples())["vmruntime_sandbox_deaths_total"] != deaths + 1:
                await asyncio.sleep(0.01)
        await stub.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    with pytest.raises(OSError, match="refused"):
        await scraper.samples()


async def test_what_a_restarted_daemon_found(settings: Settings, parts: Parts) -> None:
    image = await put_image(settings)
    scraper = Scraper()
    settings = msgspec.structs.replace(settings, metrics=MetricsSettings(address="127.0.0.1", port=scraper.port))
    recovered = 'vmruntime_sandboxes_recovered_total{outcome="%s"}'
    async with serving(settings, parts) as stub:
        pod, _ = await start(stub, settings, image, "sleep 1000")
        before = await scraper.samples()
    async with serving(settings, parts):
        assert (await scraper.samples())[recovered % "adopted"] == before[recovered % "adopted"] + 1
    assert isinstance(parts.hypervisor, FakeHypervisor)
    await parts.hypervisor.machines[pod].crash()
    async with serving(settings, parts) as stub:
        assert (await scraper.samples())[recovered % "gone"] == before[recovered % "gone"] + 1
        await stub.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))


async def test_a_port_that_is_taken(settings: Settings, parts: Parts) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wanted = MetricsSettings(address="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(
            Unavailable, match=r"metrics\.address, metrics\.port: 127\.0\.0\.1:\d+ cannot be listened on"
        ):
            async with serving(msgspec.structs.replace(settings, metrics=wanted), parts):
                pass
