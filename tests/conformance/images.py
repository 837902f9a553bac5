"""The images that cri-tools' conformance suite asks for, made here from Debian's programs."""

from __future__ import annotations

import gzip
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.support.registry import OCI_LAYER, BuiltLayer, Layout, Registry, files, layer, member
from vmruntime.images.platform import host_platform

E2E = "e2e-test-images"
STAGING = "k8s-staging-cri-tools"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_PASSWD = b"""root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/bin/false
default-user:x:1000:1000::/home/default-user:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
"""
_GROUP = b"""root:x:0:
www-data:x:33:
default-user:x:1000:
group-defined-in-image:x:50000:default-user
nogroup:x:65534:
"""
_HTTPD = b"#!/bin/sh\necho httpd is started\nexec busybox httpd -f -v -p 80 -h /www\n"
_HOSTNET = b"server { listen 12003; location / { root /var/www/html; index index.html index.nginx-debian.html; } }\n"
_SETUID = b"""#include <stdio.h>
#include <unistd.h>
int main(void) { printf("Effective uid: %d\\n", geteuid()); return 0; }
"""


def push_all(archives: Path, busybox: Path, work: Path, registry: Registry) -> str:
    """Put every image into the registry.

    Args:
        archives: Where images/demo/build.sh leaves its OCI archives.
        busybox: What images/busybox/build.sh builds.
        work: For what is made.

    Returns:
        The digest of the image that is asked for by digest.
    """
    shell = [_busybox(busybox), _users()]
    # The suite reads what BusyBox's grep says of binary input; that of GNU says it elsewhere.
    nginx = [*_layers(archives / "nginx.tar"), layer([member("usr/local/bin/grep", busybox.read_bytes(), mode=0o755)])]
    maker = _Maker(work, registry)
    for name in ("busybox:1.29-2", "busybox:1.37.0-1"):
        maker.push(f"{E2E}/{name}", shell, Cmd=["sh"])
    maker.push(f"{E2E}/nginx:1.14-2", nginx, Cmd=["nginx", "-g", "daemon off;"], StopSignal="SIGQUIT")
    maker.push(f"{E2E}/httpd:2.4.39-4", [*shell, _web_server()], Cmd=["httpd-foreground"])
    maker.push(f"{E2E}/nonewprivs:1.3", [*shell, _setuid_program()], Entrypoint=["/nnp"])
    maker.push("pause:3.9", shell, Cmd=["sleep", "infinity"])

    hostnet = f"{STAGING}/hostnet-nginx-{host_platform().architecture}"
    maker.push(f"{hostnet}:latest", [*nginx, _host_server()], Cmd=["nginx", "-g", "daemon off;"])
    users = {"uid": "1002", "username": "www-data", "uid-group": "1003:50000", "username-group": "www-data:100"}
    for name, user in users.items():
        maker.push(f"{STAGING}/test-image-user-{name}:latest", shell, User=user)
    maker.push(f"{STAGING}/test-image-predefined-group:latest", shell, User="1000")
    for name in ("test-image-latest:latest", "test-image-tag:test", "test-image-tag:all", "test-image-digest:latest"):
        maker.push(f"{STAGING}/{name}", [*shell, _mark(name)])
    for number in "123":
        maker.push(f"{STAGING}/test-image-{number}:latest", [*shell, _mark(number)])
        maker.push(f"{STAGING}/test-image-tags:{number}", [*shell, _mark("tags")])
    return maker.digests[f"{STAGING}/test-image-digest:latest"]


class _Maker:
    """Makes images and pushes them, each from a layout of its own."""

    def __init__(self, work: Path, registry: Registry) -> None:
        self._work = work
        self._registry = registry
        self.digests: dict[str, str] = {}

    def push(self, name: str, layers: Sequence[BuiltLayer], **config: object) -> None:
        layout = Layout(Path(tempfile.mkdtemp(dir=self._work)) / "layout")
        architecture = host_platform().architecture
        image = layout.image(layers, architecture=architecture, config={"Env": [_PATH], "Cmd": ["sh"], **config})
        self._registry.push(layout.publish(image), name)
        self.digests[name] = image["digest"]


def _layers(archive: Path) -> list[BuiltLayer]:
    """Return the layers of an OCI archive."""
    with tarfile.open(archive) as tar:

        def blob(digest: str) -> bytes:
            file = tar.extractfile(f"blobs/{digest.replace(':', '/')}")
            assert file is not None
            return file.read()

        index = tar.extractfile("index.json")
        assert index is not None
        manifest = json.loads(blob(json.load(index)["manifests"][0]["digest"]))
        return [_layer(blob(one["digest"])) for one in manifest["layers"]]


def _layer(blob: bytes) -> BuiltLayer:
    return BuiltLayer(gzip.decompress(blob), blob, f"{OCI_LAYER}+gzip")


def _busybox(program: Path) -> BuiltLayer:
    """Return a layer with BusyBox under the names of its applets: hard links, since the path of one of them is masked."""
    listed = subprocess.run([program, "--list"], stdout=subprocess.PIPE, check=True, text=True)
    applets = [name for name in listed.stdout.split() if name != "busybox"]
    return layer(
        [
            *(member(name, type=tarfile.DIRTYPE) for name in ("bin", "etc", "root", "var")),
            member("tmp", type=tarfile.DIRTYPE, mode=0o1777),
            member("bin/busybox", program.read_bytes(), mode=0o755),
            *(member(f"bin/{name}", type=tarfile.LNKTYPE, linkname="bin/busybox") for name in applets),
        ]
    )


def _users() -> BuiltLayer:
    return layer(
        [
            member("etc/passwd", _PASSWD),
            member("etc/group", _GROUP),
        ]
    )


def _mark(name: str) -> BuiltLayer:
    return files({"mark": name.encode()})


def _web_server() -> BuiltLayer:
    return layer([member("www/index.html", b"It works\n"), member("bin/httpd-foreground", _HTTPD, mode=0o755)])


def _host_server() -> BuiltLayer:
    return files({"etc/nginx/sites-enabled/.wh.default": b"", "etc/nginx/conf.d/default.conf": _HOSTNET})


def _setuid_program() -> BuiltLayer:
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "nnp"
        subprocess.run(["cc", "-static", "-xc", "-o", str(program), "-"], input=_SETUID, check=True)
        return layer([member("nnp", program.read_bytes(), mode=0o4755)])
