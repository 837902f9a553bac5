"""Security contexts with a real guest: each field has the effect it says, or is refused by name. One pod for nearly all."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.daemon import Daemon, container_config, sandbox_config
from tests.support.pods import out, sh
from tests.support.refusal import refused
from tests.support.registry import build_image, layer, member
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

HOSTNAME = "secured"
SYSCTLS = {
    "net.ipv4.ip_unprivileged_port_start": "90",  # of Kubernetes' safe set
    "net.core.somaxconn": "333",  # not of it, and the network namespace's
    "kernel.msgmax": "9000",  # the IPC namespace's
    "vm.max_map_count": "77777",  # the kernel's, which is the pod's own
}
ALL_CAPABILITIES = (1 << 41) - 1
CHOWN, NET_BIND_SERVICE, NET_ADMIN = 1 << 0, 1 << 10, 1 << 12
DEFAULT_CAPABILITIES = 0xA80425FB
PROBE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int count, char **words) {
    if (count == 1) { printf("%d %d\n", getuid(), geteuid()); return 0; }
    long result = -1;
    if (!strcmp(words[1], "keyctl")) result = syscall(SYS_keyctl, 0, -3, 0);
    if (!strcmp(words[1], "personality")) result = syscall(SYS_personality, 0xffffffff);
    puts(result < 0 ? strerrorname_np(errno) : "OK");
}
"""
APPLETS = ("sh", "cat", "chmod", "echo", "head", "hostname", "id", "ls", "mkdir", "ps", "sleep", "stat", "touch", "wc")
SECURITY = "config.linux.security_context"


@pytest.fixture(scope="module")
def image(daemon: Daemon, base: Path) -> str:
    """BusyBox with a program that has the set-user-id bit, and accounts with groups of their own."""
    program = base / "probe"
    subprocess.run(["cc", "-static", "-xc", "-o", str(program), "-"], input=PROBE.encode(), check=True)
    members = [
        *(member(name, type=tarfile.DIRTYPE) for name in ("bin", "etc", "tmp", "root")),
        member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755),
        *(member(f"bin/{name}", type=tarfile.SYMTYPE, linkname="busybox") for name in APPLETS),
        member("bin/probe", program.read_bytes(), mode=0o4755),
        member("etc/passwd", b"root:x:0:0::/root:/bin/sh\nweb:x:1001:1002::/srv:/bin/sh\n"),
        member("etc/group", b"root:x:0:\nweb:x:1002:\nextra:x:1003:web\n"),
    ]
    layout = build_image(base / "secured", [layer(members)])
    answer = daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=f"oci:{layout}:image")))
    return str(answer.image_ref)


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Iterator[str]:
    config = sandbox_config(HOSTNAME, daemon.base, hostname=HOSTNAME)
    config.linux.security_context.privileged = True
    config.linux.sysctls.update(SYSCTLS)
    name = str(daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)
    yield name
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=name))


def create(
    daemon: Daemon, pod: str, image: str, name: str, command: Any = ("/bin/sleep", "1000"), **security: Any
) -> str:
    security.setdefault("namespace_options", cri.NamespaceOption(pid=cri.CONTAINER))
    linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**security))
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod,
        config=container_config(name, image, list(command), linux=linux),
        sandbox_config=sandbox_config(HOSTNAME, daemon.base),
    )
    return str(daemon.runtime.CreateContainer(request).container_id)


def start(daemon: Daemon, pod: str, image: str, name: str, **security: Any) -> str:
    container = create(daemon, pod, image, name, **security)
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    return container


def denied(daemon: Daemon, container: str, script: str) -> str:
    answer = sh(daemon, container, script)
    assert answer.exit_code != 0, answer
    return str(answer.stderr.decode())


def capabilities(daemon: Daemon, container: str) -> dict[str, int]:
    """Return the capability sets of the container's first process, as numbers: Inh, Prm, Eff, Bnd, Amb."""
    lines = out(daemon, container, "cat /proc/1/status").splitlines()
    return {line[3:6]: int(line.split()[1], 16) for line in lines if line.startswith("Cap")}


def int64(value: int) -> Any:
    return cri.Int64Value(value=value)


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        ({}, "0 0 0"),
        ({"run_as_user": int64(1001)}, "1001 1002 1002 1003"),
        ({"run_as_user": int64(4711)}, "4711 0 0"),
        ({"run_as_user": int64(4711), "run_as_group": int64(99)}, "4711 99 99"),
        ({"run_as_username": "web"}, "1001 1002 1002 1003"),
        ({"run_as_username": "web", "run_as_group": int64(7)}, "1001 7 7 1003"),
        ({"run_as_username": "web", "supplemental_groups": [50]}, "1001 1002 50 1002 1003"),
        (
            {"run_as_username": "web", "supplemental_groups": [50], "supplemental_groups_policy": cri.Strict},
            "1001 1002 50 1002",
        ),
    ],
)
def test_users_and_groups(daemon: Daemon, pod: str, image: str, security: dict[str, Any], expected: str) -> None:
    container = start(daemon, pod, image, "user", **security)
    found = out(daemon, container, "id -u; id -g; id -G").split()
    assert [*found[:2], *sorted(found[2:], key=int)] == expected.split()
    told = daemon.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container)).status.user.linux
    assert [told.uid, told.gid, *sorted(told.supplemental_groups)] == [int(one) for one in expected.split()]


def test_capabilities(daemon: Daemon, pod: str, image: str) -> None:
    def given(name: str, **fields: Any) -> dict[str, int]:
        user = fields.pop("run_as_username", "")
        wanted = cri.Capability(**fields)
        return capabilities(daemon, start(daemon, pod, image, name, capabilities=wanted, run_as_username=user))

    assert given("plain") == dict.fromkeys(("Prm", "Eff", "Bnd"), DEFAULT_CAPABILITIES) | {"Inh": 0, "Amb": 0}
    assert given("added", add_capabilities=["NET_ADMIN"])["Eff"] == DEFAULT_CAPABILITIES | NET_ADMIN
    assert given("dropped", drop_capabilities=["CAP_CHOWN"])["Bnd"] == DEFAULT_CAPABILITIES & ~CHOWN
    assert given("none", drop_capabilities=["ALL"])["Bnd"] == 0
    assert given("one", drop_capabilities=["ALL"], add_capabilities=["chown"])["Bnd"] == CHOWN
    assert given("all", add_capabilities=["ALL"])["Eff"] == ALL_CAPABILITIES
    assert given("user", run_as_username="web")["Eff"] == 0
    ambient = given(
        "ambient", drop_capabilities=["ALL"], add_ambient_capabilities=["NET_BIND_SERVICE"], run_as_username="web"
    )
    assert ambient == dict.fromkeys(("Inh", "Prm", "Eff", "Bnd", "Amb"), NET_BIND_SERVICE)


def test_a_read_only_root(daemon: Daemon, pod: str, image: str) -> None:
    container = start(daemon, pod, image, "readonly", readonly_rootfs=True)
    assert "Read-only" in denied(daemon, container, "touch /tmp/x")
    out(daemon, container, "touch /dev/shm/x")
    out(daemon, start(daemon, pod, image, "writable"), "touch /tmp/x")


def test_no_new_privileges(daemon: Daemon, pod: str, image: str) -> None:
    free = start(daemon, pod, image, "free", run_as_username="web")
    assert out(daemon, free, "probe") == "1001 0"
    bound = start(daemon, pod, image, "bound", run_as_username="web", no_new_privs=True)
    assert out(daemon, bound, "probe") == "1001 1001"


def test_masked_and_read_only_paths(daemon: Daemon, pod: str, image: str) -> None:
    by_default = start(daemon, pod, image, "default")
    assert out(daemon, by_default, "head -c 1 /proc/timer_list | wc -c") == "0"
    assert "Read-only" in denied(daemon, by_default, "echo 1 > /proc/sys/vm/overcommit_memory")
    given = start(daemon, pod, image, "given", masked_paths=["/etc/passwd", "/bin/no-such"], readonly_paths=["/tmp"])
    assert out(daemon, given, "cat /etc/passwd; wc -c < /proc/timer_list") != "0"
    assert out(daemon, given, "wc -c < /etc/passwd") == "0"
    assert "Read-only" in denied(daemon, given, "touch /tmp/x")
    out(daemon, given, "echo 0 > /proc/sys/vm/overcommit_memory")  # what is given replaces the defaults


def test_seccomp(daemon: Daemon, pod: str, image: str, tmp_path: Path) -> None:
    def probe(name: str, profile: Any, **security: Any) -> str:
        container = start(daemon, pod, image, name, seccomp=profile, **security)
        return out(daemon, container, "probe keyctl; probe personality")

    kinds = cri.SecurityProfile
    assert probe("default", kinds(profile_type=kinds.RuntimeDefault)).split() == ["EPERM", "OK"]
    assert probe("unconfined", kinds(profile_type=kinds.Unconfined)).split() == ["OK", "OK"]
    assert probe("unset", None).split() == ["OK", "OK"]
    file = tmp_path / "profile.json"
    rule = {"names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
    file.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    local = kinds(profile_type=kinds.Localhost, localhost_ref=str(file))
    assert probe("local", local).split() == ["OK", "ENOSYS"]
    assert probe("privileged", local, privileged=True).split() == ["OK", "OK"]
    file.write_text(json.dumps({"defaultAction": "ALLOW"}))
    with refused(
        grpc.StatusCode.INVALID_ARGUMENT, f"{SECURITY}.seccomp.localhost_ref", str(file), "'ALLOW'", "SCMP_ACT"
    ):
        create(daemon, pod, image, "bad", seccomp=local)
    file.unlink()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"{SECURITY}.seccomp.localhost_ref", str(file), "kubelet"):
        create(daemon, pod, image, "bad", seccomp=local)


def test_privileged(daemon: Daemon, pod: str, image: str) -> None:
    privileged = start(daemon, pod, image, "privileged", privileged=True)
    assert capabilities(daemon, privileged)["Eff"] == ALL_CAPABILITIES
    assert "sda" in out(daemon, privileged, "ls /dev")
    out(daemon, privileged, "head -c 512 /dev/sda > /dev/null")
    out(
        daemon,
        privileged,
        "cat /sys/kernel/mm/transparent_hugepage/enabled > /dev/null && touch /sys/fs/cgroup/x.y || :",
    )
    out(daemon, privileged, "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
    out(daemon, privileged, "echo 0 > /proc/sys/vm/overcommit_memory && mkdir /sys/fs/cgroup/below")
    plain = start(daemon, pod, image, "plain")
    assert "sda" not in out(daemon, plain, "ls /dev")
    for place in ("/sys/kernel/mm/transparent_hugepage/enabled", "/sys/fs/cgroup/cgroup.max.depth"):
        assert "Read-only" in denied(daemon, plain, f"echo 1 > {place}")


def test_sysctls_and_host_name(daemon: Daemon, pod: str, image: str) -> None:
    container = start(daemon, pod, image, "sysctls")
    for name, value in SYSCTLS.items():
        assert out(daemon, container, f"cat /proc/sys/{name.replace('.', '/')}") == value, name
    assert out(daemon, container, "hostname; cat /etc/hostname") == f"{HOSTNAME}\n{HOSTNAME}"
    assert "not permitted" in denied(daemon, container, "hostname other")


def test_pid_namespaces(daemon: Daemon, pod: str, image: str) -> None:
    def options(**fields: Any) -> Any:
        return cri.NamespaceOption(**fields)

    own = start(daemon, pod, image, "own", command=["/bin/sleep", "1111"])
    one = start(daemon, pod, image, "one", command=["/bin/sleep", "2222"], namespace_options=options(pid=cri.POD))
    two = start(daemon, pod, image, "two", command=["/bin/sleep", "3333"], namespace_options=options(pid=cri.POD))
    target = options(pid=cri.TARGET, target_id=own)
    debug = start(daemon, pod, image, "debug", command=["/bin/sleep", "4444"], namespace_options=target)

    def seen(container: str) -> set[str]:
        lines = out(daemon, container, "ps").splitlines()
        return {number for number in ("1111", "2222", "3333", "4444") if any(f"sleep {number}" in one for one in lines)}

    assert seen(own) == seen(debug) == {"1111", "4444"}
    assert seen(one) == seen(two) == {"2222", "3333"}
    assert out(daemon, own, "cat /proc/1/cmdline").startswith("/bin/sleep")


def test_shared_memory_is_the_pods(daemon: Daemon, pod: str, image: str) -> None:
    one, two = start(daemon, pod, image, "one"), start(daemon, pod, image, "two", run_as_username="web")
    out(daemon, one, "echo shared > /dev/shm/file; chmod 666 /dev/shm/file")
    assert out(daemon, two, "cat /dev/shm/file; echo more >> /dev/shm/file") == "shared"
    assert out(daemon, one, "wc -c < /dev/shm/file; stat -c %a /dev/shm") == "12\n1777"


def test_apparmor_and_selinux_have_no_effect_where_there_is_none(daemon: Daemon, pod: str, image: str) -> None:
    kinds = cri.SecurityProfile
    options = cri.SELinuxOption(user="u", role="r", type="t", level="s0")
    for kind in (kinds.RuntimeDefault, kinds.Unconfined):
        container = start(daemon, pod, image, f"lsm-{kind}", apparmor=kinds(profile_type=kind), selinux_options=options)
        out(daemon, container, "true")


NODE, TARGET = cri.NamespaceMode.NODE, cri.NamespaceMode.TARGET
INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
LOCALHOST = cri.SecurityProfile.Localhost


@pytest.mark.parametrize(
    ("security", "code", "words"),
    [
        ({"run_as_user": int64(-1)}, INVALID, [".run_as_user", "-1", "negative"]),
        ({"run_as_user": int64(1), "run_as_username": "web"}, INVALID, ["run_as_user 1", "'web'", "leave one"]),
        ({"run_as_group": int64(9)}, INVALID, [".run_as_group", "9", "set run_as_user"]),
        ({"run_as_username": "a:b"}, INVALID, [".run_as_username", "'a:b'", "run_as_group"]),
        ({"run_as_username": "nobody"}, INVALID, ["nobody", "/etc/passwd"]),
        ({"supplemental_groups": [2**32]}, INVALID, [".supplemental_groups[0]", str(2**32)]),
        ({"supplemental_groups_policy": 7}, INVALID, [".supplemental_groups_policy", "7", "Strict"]),
        (
            {"capabilities": cri.Capability(add_capabilities=["FLY"])},
            INVALID,
            [f"{SECURITY}.capabilities.add_capabilities", "'FLY'", "capabilities(7)"],
        ),
        ({"masked_paths": ["proc"]}, INVALID, [".masked_paths[0]", "'proc'", "begin it with /"]),
        (
            {"apparmor": cri.SecurityProfile(profile_type=LOCALHOST, localhost_ref="mine")},
            INVALID,
            [".apparmor.localhost_ref", "'mine'", "no AppArmor", "Unconfined"],
        ),
        ({"seccomp": cri.SecurityProfile(profile_type=LOCALHOST)}, INVALID, [".seccomp.localhost_ref", "required"]),
        ({"namespace_options": cri.NamespaceOption(network=NODE)}, INVALID, [".network", "'NODE'", "POD", "host"]),
        ({"namespace_options": cri.NamespaceOption(ipc=NODE)}, INVALID, [".ipc", "'NODE'", "POD", "host"]),
        ({"namespace_options": cri.NamespaceOption(pid=NODE)}, PRECONDITION, [".pid", "NODE", "host"]),
        ({"namespace_options": cri.NamespaceOption(ipc=TARGET)}, INVALID, [".ipc", "'TARGET'", "POD or NODE"]),
        (
            {"namespace_options": cri.NamespaceOption(pid=TARGET, target_id="none")},
            grpc.StatusCode.NOT_FOUND,
            ["none"],
        ),
    ],
)
def test_what_cannot_be_is_refused(
    daemon: Daemon, pod: str, image: str, security: dict[str, Any], code: grpc.StatusCode, words: list[str]
) -> None:
    with refused(code, *words):
        create(daemon, pod, image, "refused", **security)


@pytest.mark.parametrize(
    ("sysctls", "words"),
    [
        (
            {"net.no.such.thing": "1"},
            ["config.linux.sysctls[net.no.such.thing]", '"1"', "No such file", "leave it out"],
        ),
        ({"net.ipv4.ip_forward": "x"}, ["config.linux.sysctls[net.ipv4.ip_forward]", '"x"', "Invalid argument"]),
        ({"../etc/passwd": "1"}, ["config.linux.sysctls", "'../etc/passwd'", "net.ipv4.ip_forward"]),
    ],
)
def test_wrong_sysctls_are_refused(daemon: Daemon, sysctls: dict[str, str], words: list[str]) -> None:
    config = sandbox_config("wrong", daemon.base)
    config.linux.sysctls.update(sysctls)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, *words):
        daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config))


def test_privileged_needs_a_privileged_sandbox(daemon: Daemon, image: str) -> None:
    config = sandbox_config("plain", daemon.base, annotations={"vmruntime.io/kind": "host"})
    pod = str(daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"{SECURITY}.privileged", "the sandbox's security context"):
        create(daemon, pod, image, "privileged", privileged=True)
    profile = cri.SecurityProfile(profile_type=LOCALHOST, localhost_ref="no-such-profile")
    with refused(
        grpc.StatusCode.FAILED_PRECONDITION, ".apparmor.localhost_ref", "'no-such-profile'", "apparmor_parser"
    ):
        create(daemon, pod, image, "profiled", apparmor=profile)
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
