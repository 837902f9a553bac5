"""The measures; each returns records. Rounds of a measure and its peer alternate, so both see the same machine."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.bed import Bed, timed
from bench.image_pods import image_pod_memory, image_pod_start
from bench.load import event_loop_stall, ten_pods_at_once
from bench.processes import by_program, field, pod_memory
from bench.raw_boot import boot_once
from bench.records import Record, percentile, record
from bench.seeded import listing_with_200_pods
from bench.throughput import exec_throughput, port_forward_throughput
from tests.support.daemon import running_daemon
from tests.support.registry import registries_conf, registry
from vmruntime.generated import cri_pb2 as cri
from vmruntime.hypervisor.interface import Accelerator

BOOT_ROUNDS = 10
CONTAINER_ROUNDS = 15
PULL_ROUNDS = 7
EXEC_ROUNDS = 50
OUTPUT_ROUNDS = 7
IDLE_PODS = 20


def sandbox_start_cold(bed: Bed) -> list[Record]:
    """RunPodSandbox until it answers, beside QEMU alone until the same agent listens."""
    accelerator = Accelerator(bed.accelerator)
    values, raw, phases = [], [], []
    for _ in range(BOOT_ROUNDS):
        raw.append(boot_once(bed.guest, bed.size(), accelerator) * 1000)
        milliseconds, pod = timed(bed.run_pod)
        values.append(milliseconds)
        phases.append(bed.info(pod)["phases_ms"])
        bed.remove_pod(pod)
    p50 = {name: round(percentile([one.get(name, 0.0) for one in phases], 50), 1) for name in phases[0]}
    peer = "QEMU alone, same machine, kernel and initramfs, to the agent's line"
    return [record("sandbox_start_cold", "ms", values, peer=peer, peer_values=raw, extra={"phases_p50_ms": p50})]


def container_start(bed: Bed) -> list[Record]:
    """CreateContainer and StartContainer, beside `crun run true` in the same guest."""
    pod = bed.run_pod(privileged=True)
    tool = bed.create(pod, "tool", ["sleep", "3600"], privileged=True)
    bed.start(tool)
    values, bare, creates = [], [], []
    for number in range(CONTAINER_ROUNDS):
        bare.append(_bare_crun(bed, tool, number))
        created, container = timed(bed.create, pod, f"c{number}", ["sleep", "3600"])
        started, _ = timed(bed.start, container)
        values.append(created + started)
        creates.append(created)
        bed.remove(container)
    bed.remove_pod(pod)
    extra = {
        "create_p50_ms": round(percentile(creates, 50), 1),
        "over_peer_ms": round(percentile(values, 50) - percentile(bare, 50), 1),
    }
    return [
        record("container_start", "ms", values, peer="crun run true in the same guest", peer_values=bare, extra=extra)
    ]


def _bare_crun(bed: Bed, tool: str, number: int) -> float:
    """Return milliseconds of one `crun run`, from five in a row: the guest's clock counts in hundredths of a second."""
    run = f"crun --root /tmp/crun --cgroup-manager=disabled run -b /bundle b{number}-$i"
    script = f"mkdir -p /tmp/crun; cat /proc/uptime; for i in 1 2 3 4 5; do {run}; done; cat /proc/uptime"
    before, after = (float(line.split()[0]) for line in bed.exec(tool, script).splitlines())
    return (after - before) * 1000 / 5


def first_output(bed: Bed) -> list[Record]:
    """RunPodSandbox, CreateContainer and StartContainer until the container's first line is in its log."""
    accelerator = Accelerator(bed.accelerator)
    values, raw = [], []
    for _ in range(OUTPUT_ROUNDS):
        raw.append(boot_once(bed.guest, bed.size(), accelerator) * 1000)
        began = time.monotonic()
        pod = bed.run_pod()
        bed.start(bed.create(pod, "hello", ["/bin/sh", "-c", "echo hello; sleep 3600"]))
        log = bed.log(pod, "hello")
        while b"hello" not in log.read_bytes():
            time.sleep(0.001)
        values.append((time.monotonic() - began) * 1000)
        bed.remove_pod(pod)
    peer = "QEMU alone, to the agent's line: no container, no output"
    return [record("first_output", "ms", values, peer=peer, peer_values=raw)]


def image_pull(bed: Bed) -> list[Record]:
    """PullImage from a registry on loopback, beside `skopeo copy` of the same image to a directory."""
    archive = bed.base / "python.tar"
    demo = Path(__file__).resolve().parent.parent / "build" / "demo-images" / "python.tar"
    subprocess.run([str(demo.parent.parent.parent / "images" / "demo" / "build.sh"), "python"], check=True)
    archive.symlink_to(demo)
    with registry(bed.base / "registry") as server:
        target = f"docker://{server.address}/bench/python:1"
        skopeo = ["skopeo", "--insecure-policy", "copy", "--quiet"]
        subprocess.run([*skopeo, "--dest-tls-verify=false", f"oci-archive:{archive}", target], check=True)
        conf = registries_conf(bed.base / "registries.conf", {server.address: server.address})
        source = f"{server.address}/bench/python:1"
        values, peer_values = [], []
        with running_daemon(bed.base / "puller", f'[images]\nregistries_conf = "{conf}"\n') as daemon:
            image = cri.ImageSpec(image=source)
            for _ in range(PULL_ROUNDS):
                with tempfile.TemporaryDirectory(dir=bed.base) as directory:
                    copy = [*skopeo, "--src-tls-verify=false", target, f"dir:{directory}/image"]
                    peer_values.append(timed(lambda argv: subprocess.run(argv, check=True), copy)[0])
                values.append(timed(daemon.images.PullImage, cri.PullImageRequest(image=image))[0])
                daemon.images.RemoveImage(cri.RemoveImageRequest(image=image))
        size = demo.stat().st_size
    peer = "skopeo copy to a directory, which unpacks nothing"
    return [record("image_pull", "ms", values, peer=peer, peer_values=peer_values, extra={"archive_bytes": size})]


def memory(bed: Bed) -> list[Record]:
    """Proportional set size of idle pods by process, and the daemon's resident memory while it has them."""
    pods = [bed.run_pod() for _ in range(IDLE_PODS)]
    found = [pod_memory(pod) for pod in pods]
    for _ in range(20):
        bed.daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest())
    resident = field(bed.daemon.pid, "status", "VmRSS:") / 1024
    for pod in pods:
        bed.remove_pod(pod)
    return [
        record("pss_idle_pod", "MiB", [one.total for one in found], extra=by_program(found)),
        record("daemon_rss_20_pods", "MiB", [resident], extra={"pods": IDLE_PODS}),
    ]


def exec_sync(bed: Bed) -> list[Record]:
    """ExecSync of `true`, which is a process in the guest each time."""
    pod = bed.run_pod()
    container = bed.create(pod, "exec", ["sleep", "3600"])
    bed.start(container)
    request = cri.ExecSyncRequest(container_id=container, cmd=["/bin/true"], timeout=30)
    values = [timed(bed.daemon.runtime.ExecSync, request)[0] for _ in range(EXEC_ROUNDS)]
    bed.remove_pod(pod)
    return [record("exec_sync", "ms", values)]


def listing(bed: Bed) -> list[Record]:
    """List and Status calls with 200 pods in the store."""
    return listing_with_200_pods(bed.base / "seeded")


Measure = Callable[[Bed], list[Record]]

MEASURES: dict[str, Measure] = {
    "sandbox_start_cold": sandbox_start_cold,
    "container_start": container_start,
    "first_output": first_output,
    "ten_pods_at_once": ten_pods_at_once,
    "event_loop_stall": event_loop_stall,
    "image_pull": image_pull,
    "pss_idle_pod": memory,
    "daemon_rss_20_pods": memory,
    "image_pod_start": image_pod_start,
    "pss_idle_image_pod": image_pod_memory,
    "exec_sync": exec_sync,
    "exec_throughput": exec_throughput,
    "port_forward_throughput": port_forward_throughput,
    "list_200_pods": listing,
    "status_200_pods": listing,
}
"""What makes each record, by the record's name; some make two in one go."""
