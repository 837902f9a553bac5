"""What an administrator decides about images: signatures, short names, mirrors, blocked registries, pins."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.support import registry as reg
from tests.support.daemon import Daemon
from tests.support.hosts import short_directory
from tests.support.image_host import NAME, Host
from tests.support.registry import Registry, build_image, files
from tests.support.signing import Keyring, Lookaside, keyring, signed_only
from vmruntime.errors import Code, FailedPrecondition, PermissionDenied, Unavailable
from vmruntime.generated import cri_pb2 as cri
from vmruntime.images.skopeo_errors import SignatureValidationFailed
from vmruntime.model.image import RegistryAuth

pytestmark = pytest.mark.root


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Registry]:
    with reg.registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture(scope="module")
def keys() -> Iterator[Keyring]:
    with keyring("vendor", "stranger") as made:
        yield made


@pytest.fixture
def signing(tmp_path: Path, server: Registry) -> Lookaside:
    return Lookaside(tmp_path / "signing", server)


@pytest.fixture
def strict(tmp_path: Path, server: Registry, signing: Lookaside, keys: Keyring) -> Host:
    """A host that takes nothing but what the vendor signed."""
    policy = signed_only(tmp_path / "policy.json", server, keys.public("vendor", tmp_path / "vendor.gpg"))
    return Host(tmp_path / "host", server.address, policy=str(policy), registries_d=str(signing.registries_d))


async def test_only_the_vendors_signature_counts(
    strict: Host, server: Registry, signing: Lookaside, keys: Keyring, tmp_path: Path
) -> None:
    signing.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "app:1", keys, "vendor")
    signing.push(build_image(tmp_path / "s", [files({"a": b"s"})]), "strange:1", keys, "stranger")
    server.push(build_image(tmp_path / "u", [files({"a": b"u"})]), "unsigned:1")
    refusals = {
        "registry.example/strange:1": rf"strange:1.*signed by the key {keys.keys['stranger']}, which the policy",
        "registry.example/unsigned:1": r"unsigned:1.*no signature exists",
        "docker.io/library/elsewhere:1": r"elsewhere:1",
    }
    server.push(build_image(tmp_path / "e", [files({"a": b"e"})]), "library/elsewhere:1")
    async with strict.service() as service:
        image = await service.pull(NAME)
        assert image.repo_tags == [NAME]
        kept = strict.layer_files()
        assert len(kept) == 1
        for name, why in refusals.items():
            downloads = len(server.blob_downloads())
            with pytest.raises(SignatureValidationFailed, match=rf"^SignatureValidationFailed: .*{why}"):
                await service.pull(name)
            assert len(server.blob_downloads()) <= downloads + 1  # the configuration; no layer
            assert service.status(name) is None
            assert strict.leftovers() == []
            assert strict.layer_files() == kept


async def test_a_signature_is_for_one_name_and_one_content(
    strict: Host, server: Registry, signing: Lookaside, keys: Keyring, tmp_path: Path
) -> None:
    signing.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "app:1", keys, "vendor")
    async with strict.service() as service:
        signed = await service.pull(NAME)
        by_digest = await service.pull(signed.repo_digests[0])
        assert by_digest.id == signed.id
        # The same content under a name nobody signed, and a new content under the signed name.
        server.copy(f"docker://{server.address}/app:1", "app:2", "--src-tls-verify=false")
        with pytest.raises(SignatureValidationFailed):
            await service.pull("registry.example/app:2")
        server.push(build_image(tmp_path / "n", [files({"a": b"n"})]), "app:1")
        with pytest.raises(SignatureValidationFailed):
            await service.pull(NAME)
        kept = service.status(NAME)
        assert kept is not None
        assert kept.id == signed.id


def test_kubelet_learns_that_it_was_the_signature(
    server: Registry, signing: Lookaside, keys: Keyring, tmp_path: Path
) -> None:
    """kubelet takes the code off errors whose code is UNKNOWN, and then looks at how the text begins."""
    server.push(build_image(tmp_path / "u", [files({"a": b"u"})]), "unsigned:1")
    signing.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "app:1", keys, "vendor")
    policy = signed_only(tmp_path / "policy.json", server, keys.public("vendor", tmp_path / "vendor.gpg"))
    conf = reg.registries_conf(tmp_path / "r.conf", {"registry.example": server.address})
    extra = f'[images]\npolicy = "{policy}"\nregistries_conf = "{conf}"\nregistries_d = "{signing.registries_d}"\n'
    with short_directory() as base:
        daemon = Daemon(base, extra, module="tests.support.fake_daemon")
        daemon.start()
        with pytest.raises(grpc.RpcError) as caught:
            daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image="registry.example/unsigned:1")))
        assert caught.value.code() is grpc.StatusCode.UNKNOWN
        assert str(caught.value.details()).startswith("SignatureValidationFailed: ")
        assert daemon.images.ListImages(cri.ListImagesRequest()).images == []
        assert daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=NAME))).image_ref
        daemon.end()


async def test_a_policy_that_cannot_be_read_lets_nothing_in(server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "app:1")
    policy = tmp_path / "policy.json"
    host = Host(tmp_path / "host", server.address, policy=str(policy))
    async with host.service() as service:
        for text in (None, "{", '{"default": [{"type": "signedBy"}]}'):
            if text is not None:
                policy.write_text(text)
            with pytest.raises(FailedPrecondition, match=r"trust policy.*policy\.json.*correct that file"):
                await service.pull(NAME)
            assert service.list() == []
            assert host.leftovers() == []


async def test_short_names_follow_aliases(server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "team/tool:1")
    server.push(build_image(tmp_path / "p", [files({"a": b"p"})]), "library/plain:latest")
    host = Host(tmp_path / "host", server.address)
    conf = Path(host.settings.registries_conf)
    conf.write_text(conf.read_text() + '[aliases]\n"tool" = "registry.example/team/tool"\n')
    async with host.service() as service:
        assert service.status("tool:1") is None
        image = await service.pull("tool:1")
        assert image.repo_tags == ["registry.example/team/tool:1"]
        assert service.status("tool:1") == image
        assert service.status("docker.io/library/tool:1") is None
        assert (await service.pull("plain")).repo_tags == ["docker.io/library/plain:latest"]
        # A changed file counts from the next pull on, as for skopeo itself.
        conf.write_text(conf.read_text().replace('"tool"', '"hammer"'))
        assert (await service.pull("hammer:1")).id == image.id
        assert service.status("tool:1") is None
        conf.write_text(conf.read_text() + '"x:1" = "y"\n')
        with pytest.raises(FailedPrecondition, match=rf"^{conf}: aliases: 'x:1' = 'y'"):
            await service.pull("plain")
    async with host.service() as service:  # a daemon starts all the same
        assert len(service.list()) == 2


async def test_an_alias_does_not_lead_credentials_elsewhere(tmp_path: Path) -> None:
    """Without an address, credentials are those of the registry that the name means to kubelet: docker.io."""
    with reg.registry(tmp_path / "registry", auth=True) as server:
        server.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "app:1")
        host = Host(tmp_path / "host", server.address)
        conf = Path(host.settings.registries_conf)
        insecure = f'[[registry]]\nlocation = "{server.address}"\ninsecure = true\n'
        conf.write_text(insecure + f'[aliases]\n"app" = "{server.address}/app"\n')
        encoded = base64.b64encode(f"{reg.USER}:{reg.PASSWORD}".encode()).decode()
        async with host.service() as service:
            with pytest.raises(PermissionDenied):
                await service.pull("app:1", RegistryAuth(auth=encoded))
            given = RegistryAuth(auth=encoded, server_address=server.address)
            assert (await service.pull("app:1", given)).repo_tags == [f"{server.address}/app:1"]


async def test_mirrors_come_first_and_the_registry_itself_last(server: Registry, tmp_path: Path) -> None:
    with reg.registry(tmp_path / "mirror") as mirror:
        host = Host(tmp_path / "host", server.address)
        conf = Path(host.settings.registries_conf)
        mirrored = '[[registry]]\nprefix = "m.example"\nlocation = "{}"\ninsecure = true\n'
        mirrored += '[[registry.mirror]]\nlocation = "{}"\ninsecure = true\n'
        conf.write_text(mirrored.format(server.address, mirror.address))
        for number, registry in enumerate((server, mirror)):
            registry.push(build_image(tmp_path / f"l{number}", [files({"n": b"%d" % number})]), "both:1")
        server.push(build_image(tmp_path / "o", [files({"o": b"o"})]), "origin:1")
        async with host.service() as service:
            both = await service.pull("m.example/both:1")
            assert both.repo_tags == ["m.example/both:1"]
            assert mirror.blob_downloads()
            assert not server.blob_downloads()
            assert (await service.pull("m.example/origin:1")).repo_tags == ["m.example/origin:1"]
            conf.write_text(mirrored.format("127.0.0.1:1", "127.0.0.1:2"))
            with pytest.raises(Unavailable, match=r"^RegistryUnavailable: .*127\.0\.0\.1:2.*127\.0\.0\.1:1"):
                await service.pull("m.example/both:1")
            assert host.leftovers() == []


async def test_a_blocked_registry(server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "app:1")
    host = Host(tmp_path / "host", server.address)
    conf = Path(host.settings.registries_conf)
    blocked = '[[registry]]\nprefix = "registry.example/secret"\nlocation = "registry.example/secret"\nblocked = true\n'
    conf.write_text(conf.read_text() + blocked)
    async with host.service() as service:
        with pytest.raises(PermissionDenied, match=r"registry\.example/secret.* is blocked in") as caught:
            await service.pull("registry.example/secret/app:1")
        assert caught.value.code is Code.PERMISSION_DENIED
        assert "an administrator of this host has blocked it" in caught.value.remedy
        assert host.leftovers() == []
        assert (await service.pull(NAME)).repo_tags == [NAME]


async def test_pinned_images_are_listed_so(server: Registry, tmp_path: Path) -> None:
    for name in ("infra/pause:3", "infra/proxy:1", "library/tool:latest", "app:1"):
        server.push(
            build_image(tmp_path / name.replace("/", "-").replace(":", "-"), [files({"n": name.encode()})]), name
        )
    names = ["registry.example/infra/pause:3", "registry.example/infra/proxy:1", "tool", NAME]
    host = Host(tmp_path / "host", server.address, pinned=["registry.example/infra/*", "tool"])
    async with host.service() as service:
        assert [(await service.pull(name)).pinned for name in names] == [True, True, True, False]
    unpinned = Host(tmp_path / "host", server.address, pinned=["*/infra/pause:*"])
    async with unpinned.service() as service:
        assert [image.pinned for image in service.list()] == [True, False, False, False]
