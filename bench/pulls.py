"""How soon an image from a registry can be run."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from bench.bed import ROOT, Bed, timed
from bench.client import Client
from bench.records import Record, beside, record
from tests.support.registry import Registry, registries_conf, registry

ROUNDS = 5
NAME = "bench/python:1"
DEMO = ROOT / "build" / "demo-images" / "python.tar"


def image_pull(bed: Bed) -> list[Record]:
    """PullImage from a registry on loopback, beside containerd's and beside `skopeo copy` to a directory."""
    subprocess.run([str(ROOT / "images" / "demo" / "build.sh"), "python"], check=True)
    values, peer_values, copies = [], [], []
    with registry(bed.base / "registry") as server:
        server.copy(f"oci-archive:{DEMO}", NAME)
        conf = registries_conf(bed.base / "registries.conf", {server.address: server.address})
        node, peer = bed.node("cold", f'[images]\nregistries_conf = "{conf}"\n'), bed.containerd
        for _ in range(ROUNDS):
            copies.append(timed(_copy, server, bed.base)[0])
            peer_values.append(_pull(peer, server))
            values.append(_pull(node, server))
    extra = {
        "beside": [beside("skopeo copy, which unpacks nothing", values, copies)],
        "archive_bytes": DEMO.stat().st_size,
    }
    words = "containerd, the same call, until the image is unpacked"
    return [record("image_pull", "ms", values, peer=words, peer_values=peer_values, extra=extra)]


def _pull(client: Client, server: Registry) -> float:
    """Pull the image and remove it with all its layers; return milliseconds of the pull."""
    milliseconds, image = timed(client.pull, f"{server.address}/{NAME}")
    client.remove_image(image)
    return milliseconds


def _copy(server: Registry, base: Path) -> None:
    """Fetch the image and unpack nothing."""
    with tempfile.TemporaryDirectory(dir=base) as directory:
        skopeo = ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"]
        subprocess.run([*skopeo, f"docker://{server.address}/{NAME}", f"dir:{directory}/image"], check=True)
