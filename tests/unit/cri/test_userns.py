"""User namespaces: what CRI may ask for, what it gets back, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.cri.conftest import container_config, sandbox_config
from vmruntime.cri.translate.container import container_from_cri
from vmruntime.cri.translate.sandbox import sandbox_from_cri
from vmruntime.cri.translate.security import namespaces_to_cri
from vmruntime.errors import InvalidArgument
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import ContainerSpec
from vmruntime.model.sandbox import IdMapping, SandboxKind, SandboxSpec, UserNamespace

EVERY = frozenset(SandboxKind)
FIELD = "config.linux.security_context.namespace_options.userns_options"
UIDS, GIDS = (IdMapping(container_id=0, host_id=first, length=65536) for first in (100_000, 300_000))


def mapping(first: int, *, container_id: int = 0, length: int = 65536) -> cri.IDMapping:
    return cri.IDMapping(container_id=container_id, host_id=first, length=length)


def options(uids: Any = None, gids: Any = None, mode: Any = cri.POD) -> cri.UserNamespace:
    return cri.UserNamespace(
        mode=mode,
        uids=[mapping(100_000)] if uids is None else uids,
        gids=[mapping(300_000)] if gids is None else gids,
    )


def pod(kind: str = "container", **namespaces: Any) -> SandboxSpec:
    security = cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(**namespaces))
    config = sandbox_config(linux=cri.LinuxPodSandboxConfig(security_context=security))
    request = cri.RunPodSandboxRequest(config=config, runtime_handler=kind)
    return sandbox_from_cri(request, default_kind=SandboxKind.CONTAINER, supported=EVERY)


def container(sandbox: SandboxSpec, mounts: Any = (), user: Any = None, **security: Any) -> ContainerSpec:
    context = cri.LinuxContainerSecurityContext(namespace_options=cri.NamespaceOption(userns_options=user), **security)
    config = container_config(linux=cri.LinuxContainerConfig(security_context=context), mounts=mounts)
    request = cri.CreateContainerRequest(pod_sandbox_id="x", config=config)
    return container_from_cri(request, sandbox, supported=EVERY)


def test_pod_and_node() -> None:
    for kind in ("container", "host"):
        namespaces = pod(kind, userns_options=options()).namespaces
        assert namespaces.user_namespace == UserNamespace(uids=UIDS, gids=GIDS)
        assert namespaces_to_cri(namespaces).userns_options == options()
    for nothing in (None, options([], [], cri.NODE)):
        namespaces = pod(userns_options=nothing).namespaces
        assert namespaces.user_namespace is None
        assert not namespaces_to_cri(namespaces).HasField("userns_options")


@pytest.mark.parametrize(
    ("user", "words"),
    [
        (options(mode=cri.TARGET), [".mode", "TARGET"]),
        (options(mode=cri.CONTAINER), [".mode", "CONTAINER"]),
        (options(mode=77), [".mode", "77"]),
        (options(mode=cri.NODE), [".uids", "NODE"]),
        (options([], [mapping(1)], cri.NODE), [".gids", "NODE"]),
        (options([]), [".uids has 0 mappings", "exactly one"]),
        (options(gids=[mapping(1), mapping(2)]), [".gids has 2 mappings"]),
        (options([mapping(1, container_id=5)]), [".uids[0].container_id", "5"]),
        (options([mapping(1, length=0)]), [".uids[0].length"]),
        (options(gids=[mapping(2**32 - 2, length=2)]), [".gids[0]", "last id"]),
    ],
)
def test_what_cannot_be_a_user_namespace_is_named(user: cri.UserNamespace, words: list[str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        pod(userns_options=user)
    assert str(caught.value).startswith(FIELD)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("which", ["network", "pid", "ipc"])
def test_the_hosts_namespaces_exclude_one(which: str) -> None:
    with pytest.raises(InvalidArgument, match=f"userns_options.mode: POD.*{which}: NODE"):
        pod("host", userns_options=options(), **{which: cri.NODE})


def test_image_pods_have_users_of_their_own() -> None:
    with pytest.raises(InvalidArgument, match="kind image"):
        pod("image", userns_options=options())


def test_containers_have_their_pods() -> None:
    with_one, without = pod(userns_options=options()), pod()
    assert container(with_one, user=options()).security.namespaces.user_namespace is not None
    container(with_one)  # says nothing, gets the pod's
    container(without, user=options([], [], cri.NODE))
    for sandbox, user in (
        (with_one, options([], [], cri.NODE)),
        (with_one, options([mapping(7)])),
        (without, options()),
    ):
        with pytest.raises(InvalidArgument, match=rf"{FIELD}.*differs from the sandbox's .*every container"):
            container(sandbox, user=user)


@pytest.mark.parametrize(
    ("field", "security"),
    [
        ("run_as_user", {"run_as_user": cri.Int64Value(value=65536)}),
        ("run_as_group", {"run_as_user": cri.Int64Value(value=1), "run_as_group": cri.Int64Value(value=65536)}),
        ("supplemental_groups[1]", {"supplemental_groups": [65535, 65536]}),
    ],
)
def test_ids_beyond_the_range_are_refused(field: str, security: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        container(pod(userns_options=options()), **security)
    assert str(caught.value).startswith(f"config.linux.security_context.{field}: 65536 is not in")
    assert "0 to 65535" in str(caught.value)
    container(pod(), **security)


def test_mounts_with_ids() -> None:
    uids, gids = [mapping(100_000)], [mapping(300_000)]
    one = cri.Mount(container_path="/a", host_path="/b", uidMappings=uids, gidMappings=gids)
    spec = container(pod(), [one])
    assert spec.mounts[0].ids == UserNamespace(uids=UIDS, gids=GIDS)
    with pytest.raises(InvalidArgument, match=r"config.mounts\[0\].gidMappings has 0 mappings"):
        container(pod(), [cri.Mount(container_path="/a", host_path="/b", uidMappings=uids)])
    image = cri.Mount(
        container_path="/a", readonly=True, image=cri.ImageSpec(image="i"), uidMappings=uids, gidMappings=gids
    )
    container(pod(userns_options=options()), [image])
    with pytest.raises(InvalidArgument, match=r"config.mounts\[0\].uidMappings: uids 0 100000 .* NODE"):
        container(pod(), [image])
