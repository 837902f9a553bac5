"""A real registry on loopback, and small images to put into it."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import re
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

USER = "alice"
PASSWORD = "s3cret-pass"
# bcrypt, the one form docker-registry takes: perl -e 'print crypt("s3cret-pass", q($2y$05$…))'
_HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuuV7fpPozvyqJfnY19y0802WTlXUm6Rjy\n"

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"


@dataclasses.dataclass
class Registry:
    """A running docker-registry.

    Attributes:
        address: 127.0.0.1:PORT.
        auth: It wants USER and PASSWORD.
    """

    address: str
    directory: Path
    auth: bool

    def requests(self) -> list[str]:
        """Return "METHOD /path status" of every request so far."""
        text = (self.directory / "log").read_text()
        return [f"{m[1]} {m[2]} {m[3]}" for m in re.finditer(r'"(\w+) (\S+) HTTP/[\d.]+" (\d+)', text)]

    def blob_downloads(self) -> list[str]:
        """Return the digests of blobs that were fetched, in order."""
        return [line.split("/blobs/")[1].split()[0] for line in self.requests() if re.match(r"GET \S+/blobs/", line)]

    def blob_file(self, digest: str) -> Path:
        """Return the file in which the registry keeps a blob."""
        hexa = digest.removeprefix("sha256:")
        return self.directory / f"data/docker/registry/v2/blobs/sha256/{hexa[:2]}/{hexa}/data"

    def manifest(self, name: str) -> Any:
        """Return the manifest of name:tag."""
        argv = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{self.address}/{name}"]
        return json.loads(subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout)

    def push(self, layout: Path, name: str, *options: str) -> None:
        """Copy the image of an OCI layout here, under name:tag."""
        self.copy(f"oci:{layout}:image", name, *options)

    def copy(self, source: str, name: str, *options: str) -> None:
        """Copy an image here, under name:tag; `source` is as skopeo takes it."""
        argv = ["skopeo", "--insecure-policy", "copy", "--quiet", "--all", "--dest-tls-verify=false", *options]
        if self.auth:
            argv += [f"--dest-creds={USER}:{PASSWORD}"]
        subprocess.run([*argv, source, f"docker://{self.address}/{name}"], check=True)


@contextlib.contextmanager
def registry(directory: Path, *, auth: bool = False) -> Iterator[Registry]:
    """Run a registry that keeps everything in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config: dict[str, Any] = {
        "version": "0.1",
        "log": {"accesslog": {"disabled": False}, "level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(directory / "data")}, "delete": {"enabled": True}},
        "http": {"addr": address, "secret": "loopback"},
    }
    if auth:
        (directory / "htpasswd").write_text(_HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
    (directory / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with open(directory / "log", "wb") as log:
        server = subprocess.Popen(
            ["docker-registry", "serve", str(directory / "config.yml")], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_for(address, server, directory / "log")
        yield Registry(address, directory, auth)
    finally:
        server.terminate()
        server.wait(10)


def registries_conf(path: Path, locations: Mapping[str, str]) -> Path:
    """Write a containers-registries.conf(5) that sends names to loopback registries without TLS.

    Args:
        locations: Prefix of names ("registry.example", "docker.io") to host:port.
    """
    text = "".join(
        f'[[registry]]\nprefix = "{prefix}"\nlocation = "{location}"\ninsecure = true\n'
        for prefix, location in locations.items()
    )
    path.write_text(text)
    return path


def mirror_conf(path: Path, domain: str, mirror: str, *insecure: str) -> Path:
    """Write a containers-registries.conf(5) in which a registry has a mirror on loopback.

    Args:
        path: The file.
        domain: The registry that names speak of, such as docker.io; it is never reached.
        mirror: host:port of the mirror, without TLS.
        insecure: host:port of more registries without TLS.
    """
    text = f'[[registry]]\nprefix = "{domain}"\nlocation = "{domain}"\n'
    text += f'[[registry.mirror]]\nlocation = "{mirror}"\ninsecure = true\n'
    text += "".join(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n' for address in insecure)
    path.write_text(text)
    return path


@dataclasses.dataclass(frozen=True)
class BuiltLayer:
    """A layer as bytes."""

    tar: bytes
    blob: bytes
    media_type: str

    @property
    def diff_id(self) -> str:
        return sha256(self.tar)

    @property
    def digest(self) -> str:
        return sha256(self.blob)


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return one tar member; fields are those of TarInfo (type, linkname, mode, uid, mtime, pax_headers…)."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mtime = 1_000_000_000
    info.mode = 0o755 if fields.get("type") == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def make_tar(members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=1, mtime=0)


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout


def layer(
    members: Sequence[tuple[tarfile.TarInfo, bytes]] | bytes,
    pack: Callable[[bytes], bytes] | None = gzipped,
) -> BuiltLayer:
    """Build a layer from members (or a whole tar), packed by gzip, zstd or nothing."""
    tar = members if isinstance(members, bytes) else make_tar(members)
    suffix = "+gzip" if pack is gzipped else "+zstd" if pack is zstd else ""
    return BuiltLayer(tar, pack(tar) if pack else tar, OCI_LAYER + suffix)


def files(contents: Mapping[str, bytes]) -> BuiltLayer:
    """Build a layer of plain files."""
    return layer([member(name, content) for name, content in contents.items()])


class Layout:
    """An OCI layout under construction, with one image named "image"."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes, media_type: str, **extra: Any) -> dict[str, Any]:
        """Write a blob and return its descriptor."""
        digest = sha256(data)
        (self.directory / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data), **extra}

    def image(
        self,
        layers: Sequence[BuiltLayer],
        *,
        architecture: str = "amd64",
        os: str = "linux",
        config: Mapping[str, Any] | None = None,
        diff_ids: Sequence[str] | None = None,
        **extra: Any,
    ) -> dict[str, Any]:
        """Write one platform's image and return its descriptor."""
        ids = [built.diff_id for built in layers] if diff_ids is None else list(diff_ids)
        file = {
            "architecture": architecture,
            "os": os,
            "config": dict(config or {"Cmd": ["/bin/true"]}),
            "rootfs": {"type": "layers", "diff_ids": ids},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self.blob(json.dumps(file).encode(), OCI_CONFIG),
            "layers": [self.blob(built.blob, built.media_type) for built in layers],
        }
        return self.blob(json.dumps(manifest).encode(), OCI_MANIFEST, **extra)

    def multi_platform(self, images: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Write an index of images and return its descriptor."""
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(images)}
        return self.blob(json.dumps(index).encode(), OCI_INDEX)

    def publish(self, descriptor: dict[str, Any]) -> Path:
        """Name what the layout is to be; return its directory."""
        named = {**descriptor, "annotations": {"org.opencontainers.image.ref.name": "image"}}
        (self.directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
        return self.directory


def build_image(directory: Path, layers: Sequence[BuiltLayer], **fields: Any) -> Path:
    """Write an OCI layout of one image and return its directory; fields are those of Layout.image."""
    layout = Layout(directory)
    return layout.publish(layout.image(layers, **fields))


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"docker-registry ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.02)
    raise RuntimeError("docker-registry does not listen")
