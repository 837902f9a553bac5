"""Pods' networks with the real plugins: both IP versions, two interfaces, host ports, limits of traffic, host pods."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import secrets
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support import leaks
from tests.support.daemon import Daemon, container_config, running_daemon, sandbox_config
from tests.support.pods import out, run_pod, sh, start
from tests.support.refusal import refused
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

PLUGINS = "/usr/lib/cni"
MTU = 1410
RATE = 8_000_000

# A second bridge in the chain, as Multus makes one: run under another interface's name, and not in the chain's result.
SECOND = """#!/bin/sh
case $CNI_COMMAND in VERSION) exec PLUGINS/bridge ;; CHECK) exit 0 ;; esac
exec python3 -c '
import json, os, subprocess, sys
request = json.load(sys.stdin)
before = request.pop("prevResult", None)
bridge = {**request, **request.pop("network"), "type": "bridge"}
environment = {**os.environ, "CNI_IFNAME": "net1"}
done = subprocess.run(["PLUGINS/bridge"], input=json.dumps(bridge).encode(), env=environment, stdout=subprocess.PIPE)
if done.returncode:
    sys.stdout.buffer.write(done.stdout)
elif os.environ["CNI_COMMAND"] == "ADD":
    ip = ["ip", "-n", os.path.basename(os.environ["CNI_NETNS"])]
    for command in request["ip"]:
        subprocess.run([*ip, *command.split()], check=True)
    print(json.dumps(before))
sys.exit(done.returncode)
'
""".replace("PLUGINS", PLUGINS)

UDP_ECHO = """
#include <arpa/inet.h>
#include <sys/socket.h>
int main(void) {
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(7001)}, from;
    int s = socket(AF_INET6, SOCK_DGRAM, 0);
    char data[512];
    if (bind(s, (void *)&any, sizeof any)) return 1;
    for (;;) {
        socklen_t size = sizeof from;
        int got = recvfrom(s, data, sizeof data, 0, (void *)&from, &size);
        if (got > 0) sendto(s, data, got, 0, (void *)&from, size);
    }
}
"""


class Networks:
    """Subnets nobody else has, and a chain that uses them."""

    def __init__(self, base: Path) -> None:
        number = secrets.randbelow(2**14)
        self.first, self.second = (
            f"10.{192 + one // 256}.{one % 256}" for one in (2 * number // 2, 2**14 - 1 - number)
        )
        self.v6 = f"fd{secrets.token_hex(1)}:{number:x}::"
        self.base = base
        self.other = ""

    def write(self, path: Path) -> None:
        """Put the chain in place of the daemon's simple one."""
        conf = json.loads(path.read_text())
        bridge = conf["plugins"][0]
        data = {"type": "host-local", "dataDir": str(self.base / "ipam")}
        ranges = [[{"subnet": f"{self.first}.0/24"}], [{"subnet": f"{self.v6}/64"}]]
        bridge |= {
            "mtu": MTU,
            "ipam": {**data, "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]},
            "dns": {"nameservers": ["192.0.2.53"], "search": ["from-the-network"]},
        }
        self.other = f"{bridge['bridge']}b"
        routes = [{"dst": "198.51.100.0/24", "gw": f"{self.second}.1"}]
        second = {
            "type": "second",
            "ip": [
                f"route add 203.0.113.0/24 via {self.second}.1 dev net1 metric 50 mtu 1280",
                f"route add 203.0.113.0/24 via {self.first}.1 dev eth0 metric 60",
                f"neigh add {self.second}.77 lladdr 02:00:00:00:00:77 nud permanent dev net1",
            ],
            "network": {
                "bridge": self.other,
                "isGateway": True,
                "mtu": 1300,
                "ipam": {**data, "ranges": [[{"subnet": f"{self.second}.0/24"}]], "routes": routes},
            },
        }
        portmap = {"type": "portmap", "snat": True, "capabilities": {"portMappings": True}}
        shaping = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
        conf["plugins"] = [bridge, second, portmap, shaping]
        path.write_text(json.dumps(conf, indent=1))


@pytest.fixture(scope="module")
def networks(base: Path) -> Networks:
    return Networks(base / "n")


@pytest.fixture(scope="module")
def daemon(base: Path, networks: Networks) -> Iterator[Daemon]:
    """A daemon whose pods have two interfaces, the first with both IP versions."""
    directory = base / "n"
    bin_dir = directory / "bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "second").write_text(SECOND)
    (bin_dir / "second").chmod(0o755)
    daemon = Daemon(directory, f'[network]\nbin_dirs = ["{bin_dir}", "{PLUGINS}"]')
    networks.write(directory / "net.d" / "10-test.conflist")
    daemon.start()
    try:
        yield daemon
    finally:
        try:
            daemon.end()
        finally:
            subprocess.run(["ip", "link", "delete", networks.other], check=False, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def ports() -> list[int]:
    """Free ports of the host."""
    found = []
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            found.append(taken.getsockname()[1])
    return found


@pytest.fixture(scope="module")
def echo(base: Path) -> Path:
    """A static program that sends UDP datagrams at port 7001 back."""
    directory = base / "echo"
    directory.mkdir()
    (directory / "echo.c").write_text(UDP_ECHO)
    subprocess.run(["cc", "-static", "-o", directory / "echo", directory / "echo.c"], check=True)
    return directory


SYSCTLS = {"net.ipv4.ip_unprivileged_port_start": "77", "net.core.somaxconn": "999"}
DNS = cri.DNSConfig(servers=["192.0.2.1", "fd00::53"], searches=["svc.local", "local"], options=["ndots:3", "edns0"])


@pytest.fixture(scope="module")
def pod(daemon: Daemon, ports: list[int]) -> Iterator[str]:
    """A pod in a VM with everything that a network can be asked for."""
    mappings = [
        cri.PortMapping(protocol=cri.TCP, container_port=7000, host_port=ports[0]),
        cri.PortMapping(protocol=cri.UDP, container_port=7001, host_port=ports[1]),
        cri.PortMapping(protocol=cri.TCP, container_port=7000, host_port=ports[2], host_ip="127.0.0.1"),
    ]
    config = sandbox_config("net", daemon.base, hostname="named", dns_config=DNS, port_mappings=mappings)
    config.annotations["kubernetes.io/ingress-bandwidth"] = "8M"
    config.linux.sysctls.update(SYSCTLS)
    name = str(daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)
    yield name
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=name))


@pytest.fixture(scope="module")
def container(daemon: Daemon, pod: str, busybox: str, echo: Path) -> str:
    image = daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=busybox))).image_ref
    mounts = [cri.Mount(container_path="/echo", host_path=str(echo), readonly=True)]
    script = "/echo/echo & while true; do echo answer | nc -l -p 7000; done"
    return start(daemon, pod, image, "main", script, mounts=mounts)


@pytest.fixture(autouse=True)
def no_leaks(no_leaks: None, daemon: Daemon, container: str) -> None:
    """The check of every test begins when what they share is there."""


def addresses(daemon: Daemon, pod: str) -> list[str]:
    network = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.network
    return [network.ip, *(more.ip for more in network.additional_ips)]


def eventually(answers: Callable[[], bytes], expected: bytes, seconds: float = 20.0) -> None:
    """Ask until the right answer comes: between two answers the server in the pod does not listen."""
    end = time.monotonic() + seconds
    got: bytes | OSError = b""
    while got != expected and time.monotonic() < end:
        try:
            got = answers()
        except OSError as error:
            got = error
            time.sleep(0.05)
    assert got == expected


def ask(address: str, port: int) -> Callable[[], bytes]:
    def call() -> bytes:
        with socket.create_connection((address, port), timeout=3) as connection:
            return connection.recv(100)

    return call


def test_the_status_has_every_address(daemon: Daemon, pod: str, networks: Networks) -> None:
    shown = addresses(daemon, pod)
    assert [one.rpartition("." if "." in one else "::")[0] for one in shown] == [
        networks.first,
        networks.v6.rstrip(":"),
        networks.second,
    ]
    verbose = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    info = json.loads(verbose.info["info"])
    # The bridge finds every address in the namespace, though the guest has them. (portmap 1.1 misses rules of IPv4 among
    # those of IPv6.)
    assert "bridge" not in info["network_check"]
    assert [(nic["name"], nic["mtu"]) for nic in info["interfaces"]] == [("eth0", MTU), ("net1", 1300)]
    assert info["interfaces"][0]["addresses"] == [f"{shown[0]}/24", f"{shown[1]}/64"]


def test_interfaces_and_routes_in_the_guest(daemon: Daemon, pod: str, container: str, networks: Networks) -> None:
    v4, v6, second = addresses(daemon, pod)
    shown = out(daemon, container, "busybox ip -o addr")
    for interface, address in (("eth0", f"{v4}/24"), ("eth0", f"{v6}/64"), ("net1", f"{second}/24")):
        assert re.search(rf"^\d+: {interface}\s+inet6? {re.escape(address)} ", shown, re.MULTILINE), shown
    assert out(daemon, container, "cat /sys/class/net/eth0/mtu /sys/class/net/net1/mtu") == f"{MTU}\n1300"
    lines = [" ".join(line.split()) for line in out(daemon, container, "busybox ip route").splitlines()]
    routes = {" ".join(line.split()[:5]) for line in lines}
    assert f"default via {networks.first}.1 dev eth0" in routes
    assert f"198.51.100.0/24 via {networks.second}.1 dev net1" in routes
    # What no result mentions: routes with their metric, and neighbours that need not be asked for.
    preferred, other = (line for line in lines if line.startswith("203.0.113.0/24"))
    assert preferred.startswith(f"203.0.113.0/24 via {networks.second}.1 dev net1 metric 50"), preferred
    assert other.startswith(f"203.0.113.0/24 via {networks.first}.1 dev eth0 metric 60"), other
    known = out(daemon, container, "busybox ip neigh show nud permanent")
    assert f"{networks.second}.77 dev net1 lladdr 02:00:00:00:00:77" in known
    assert f"default via {networks.v6}1 dev eth0" in out(daemon, container, "busybox ip -6 route")


def test_name_resolution_host_name_and_sysctls(daemon: Daemon, container: str, pod: str) -> None:
    assert out(daemon, container, "cat /etc/resolv.conf").splitlines() == [
        "search svc.local local",
        "nameserver 192.0.2.1",
        "nameserver fd00::53",
        "options ndots:3 edns0",
    ]
    assert out(daemon, container, "hostname") == "named"
    hosts = out(daemon, container, "cat /etc/hosts").split("\n")
    assert all(f"{address}\tnamed" in hosts for address in addresses(daemon, pod))
    for name, value in SYSCTLS.items():
        assert out(daemon, container, f"cat /proc/sys/{name.replace('.', '/')}") == value


def test_host_and_pod_reach_each_other(daemon: Daemon, pod: str, container: str, networks: Networks) -> None:
    """On each address of the pod, and from it to each of the host's bridges."""
    for address in addresses(daemon, pod):
        eventually(ask(address, 7000), b"answer\n")
        eventually(lambda: answered_datagram(address, 7001), b"datagram")  # noqa: B023
    for address in (f"{networks.first}.1", f"{networks.v6}1", f"{networks.second}.1"):
        with serving(address, b"from the host\n") as port:
            assert out(daemon, container, f"nc {address} {port} </dev/null") == "from the host"
    with serving(f"{networks.first}.1", b"x" * 1_500_000) as port:  # whole packets pass, at the network's MTU
        count = out(daemon, container, f"nc {networks.first}.1 {port} </dev/null | wc -c")
        assert int(count) == 1_500_000


def test_a_route_has_its_own_mtu(daemon: Daemon, container: str, networks: Networks) -> None:
    """As the largest segment tells that the guest announces by it; the interface's is 1300."""
    segments = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            segments.append(self.request.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG))

    address = ["ip", "addr", "add", "203.0.113.1/32", "dev", networks.other]
    subprocess.run(address, check=True)  # it goes with the bridge
    with listening("203.0.113.1", Handler) as port:
        out(daemon, container, f"nc 203.0.113.1 {port} </dev/null")
    assert 1280 - 40 - 12 <= segments[0] <= 1280 - 40  # headers, options


def answered_datagram(address: str, port: int) -> bytes:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(2)
        sender.connect((address, port))
        sender.send(b"datagram")
        return sender.recv(100)


@contextlib.contextmanager
def serving(address: str, answer: bytes) -> Iterator[int]:
    """Answer every connection to an address of the host; yields the port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(answer)

    with listening(address, Handler) as port:
        yield port


@contextlib.contextmanager
def listening(address: str, handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    """Serve connections to an address of the host; yields the port."""

    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

    with Server((address, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_ports_of_the_host_lead_to_the_pod(
    daemon: Daemon, ports: list[int], networks: Networks, container: str
) -> None:
    anywhere, datagrams, loopback_only = ports
    for address in ("127.0.0.1", f"{networks.first}.1"):
        eventually(ask(address, anywhere), b"answer\n")
        eventually(lambda: answered_datagram(address, datagrams), b"datagram")  # noqa: B023
        # From the pod as well, which then answers itself.
        command = f"nc -w 3 {address} {anywhere} </dev/null || true"
        if not address.startswith("127."):
            eventually(lambda: sh(daemon, container, command).stdout, b"answer\n")  # noqa: B023
    eventually(ask(f"{networks.v6}1", anywhere), b"answer\n")
    eventually(ask("127.0.0.1", loopback_only), b"answer\n")
    with pytest.raises(ConnectionRefusedError):
        ask(f"{networks.first}.1", loopback_only)()


def test_traffic_to_the_pod_is_limited(daemon: Daemon, container: str, networks: Networks) -> None:
    """Annotations become the bandwidth plugin's limits, which hold for a VM's frames as well."""
    size = 2_000_000
    with serving(f"{networks.first}.1", b"x" * size) as port:
        began = time.monotonic()
        assert int(out(daemon, container, f"nc {networks.first}.1 {port} </dev/null | wc -c")) == size
        seconds = time.monotonic() - began
    burst = 2**20
    assert seconds > (size * 8 - burst) / RATE * 0.9


OWN = cri.NamespaceOption(pid=cri.NamespaceMode.NODE)
NODE = cri.NamespaceOption(network=cri.NamespaceMode.NODE)


def host_pod(daemon: Daemon, image: str, name: str, namespaces: Any, **sysctls: str) -> tuple[str, str]:
    """Run a pod on the host with a container that waits."""
    config = sandbox_config(name, daemon.base, hostname=f"{name}-host", dns_config=DNS)
    config.linux.security_context.namespace_options.CopyFrom(namespaces)
    config.linux.sysctls.update(sysctls)
    config.annotations["kubernetes.io/egress-bandwidth"] = "1G"  # bandwidth 1.1 crashes at CHECK without a limit
    pod = str(daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)
    context = cri.LinuxContainerSecurityContext(namespace_options=namespaces)
    linux = cri.LinuxContainerConfig(security_context=context)
    script = "while true; do echo answer | nc -l -p 7000; done"
    container = container_config("main", image, ["/bin/sh", "-c", script], linux=linux)
    request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
    created = str(daemon.runtime.CreateContainer(request).container_id)
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=created))
    return pod, created


def test_a_host_pod_with_a_network_of_its_own(daemon: Daemon, image: str, networks: Networks) -> None:
    pod, container = host_pod(daemon, image, "own", OWN, **{"net.ipv4.ip_unprivileged_port_start": "66"})
    shown = addresses(daemon, pod)
    assert len(shown) == 3
    inside = out(daemon, container, "busybox ip -o addr")
    assert all(f" {address}/" in inside for address in shown)
    assert out(daemon, container, "cat /sys/class/net/eth0/mtu") == str(MTU)
    assert out(daemon, container, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start") == "66"
    assert "options ndots:3 edns0" in out(daemon, container, "cat /etc/resolv.conf")
    assert out(daemon, container, "hostname") == "own-host"
    for address in shown:
        eventually(ask(address, 7000), b"answer\n")
    with serving(f"{networks.v6}1", b"from the host\n") as port:
        assert out(daemon, container, f"nc {networks.v6}1 {port} </dev/null") == "from the host"


def test_a_network_that_was_damaged_is_told(daemon: Daemon, image: str) -> None:
    """By CHECK, in a verbose status and in the log of the next daemon; the pod goes on."""
    pod, container = host_pod(daemon, image, "damaged", OWN)

    def checked() -> str:
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
        return str(json.loads(daemon.runtime.PodSandboxStatus(request).info["info"])["network_check"])

    assert checked() == "as it was made"
    subprocess.run(["ip", "-n", f"vmrt-{pod[:13]}", "route", "delete", "default"], check=True)
    assert "bridge CHECK failed" in checked()
    daemon.stop()
    daemon.start()
    end = time.monotonic() + 20
    while not re.search(f"not as it was made.*{pod}", daemon.log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert out(daemon, container, "echo here") == "here"


def test_a_host_pod_in_the_hosts_network(daemon: Daemon, image: str, networks: Networks) -> None:
    pod, container = host_pod(daemon, image, "node", NODE)
    assert addresses(daemon, pod) == [""]
    here = {line.split()[1] for line in out(daemon, container, "busybox ip -o link").splitlines()}
    assert {f"{name}:" for name in os.listdir("/sys/class/net")} <= {
        name.partition("@")[0].rstrip(":") + ":" for name in here
    }
    assert "nameserver 192.0.2.1" in out(daemon, container, "cat /etc/resolv.conf")
    eventually(ask("127.0.0.1", 7000), b"answer\n")


def test_dns_of_the_network_and_ptp(base: Path, busybox: str) -> None:
    """Without DNS from kubelet the network's counts; ptp leads everything by the gateway, also to its own subnet."""
    directory = base / "p"
    with running_daemon(directory) as daemon:
        path = directory / "net.d" / "10-test.conflist"
        conf = json.loads(path.read_text())
        conf["plugins"][0] |= {"type": "ptp", "dns": {"nameservers": ["192.0.2.53"], "search": ["from-the-network"]}}
        path.write_text(json.dumps(conf))
        image = daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=busybox))).image_ref
        pods = [run_pod(daemon, name) for name in ("one", "two")]
        script = "while true; do echo answer | nc -l -p 7000; done"
        one, _ = (start(daemon, pod, image, "main", script) for pod in pods)
        first, second = (addresses(daemon, pod)[0] for pod in pods)
        assert out(daemon, one, "cat /etc/resolv.conf") == "search from-the-network\nnameserver 192.0.2.53"
        gateway = first.rpartition(".")[0] + ".1"
        routes = out(daemon, one, "busybox ip route")
        assert f"{gateway} dev eth0" in routes
        assert f"default via {gateway} dev eth0" in routes
        assert f"{first}/32" in out(daemon, one, "busybox ip -o -4 addr show dev eth0")
        eventually(ask(first, 7000), b"answer\n")
        eventually(lambda: out(daemon, one, f"nc -w 3 {second} 7000 </dev/null || true").encode(), b"answer")
        assert leaks.find(daemon.footprint)


TEMPLATE = """{"cniVersions": ["1.0.0"], "name": "NAME", "plugins": [{"type": "bridge", "bridge": "NAME", "isGateway": true,
 "ipam": {"type": "host-local", "dataDir": "BASE/ipam", "ranges": ${ranges}, "routes": ${routes}}}]}"""


def test_the_pod_cidr_of_kubelet(base: Path, busybox: str, networks: Networks) -> None:
    """No pods until kubelet has told it; then a template becomes the network, and stays over a restart."""
    directory = base / "t"
    daemon = Daemon(directory, f'[network]\nconf_dir = "{directory}/t.d"\nconf_template = "{directory}/template"')
    template = TEMPLATE.replace("NAME", daemon.footprint.bridge).replace("BASE", str(directory))
    (directory / "template").write_text(template)
    cidrs = f"{networks.second}.0/25,{networks.v6[:-2]}:1::/80"
    daemon.start()
    try:
        assert "waits for kubelet's pod CIDR" in network_condition(daemon).message
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "waits for kubelet's pod CIDR"):
            run_pod(daemon, "early")
        config = cri.RuntimeConfig(network_config=cri.NetworkConfig(pod_cidr=cidrs))
        daemon.runtime.UpdateRuntimeConfig(cri.UpdateRuntimeConfigRequest(runtime_config=config))
        daemon.stop()
        daemon.start()
        assert network_condition(daemon).status
        image = daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=busybox))).image_ref
        pod, _ = host_pod(daemon, image, "own", OWN)
        networks_of_pod = [ipaddress.ip_network(cidr) for cidr in cidrs.split(",")]
        shown = addresses(daemon, pod)
        assert [ipaddress.ip_address(one) in where for one, where in zip(shown, networks_of_pod, strict=True)] == [
            True
        ] * 2
        for address in shown:
            eventually(ask(address, 7000), b"answer\n")
    finally:
        daemon.end()


def network_condition(daemon: Daemon) -> Any:
    conditions = daemon.runtime.Status(cri.StatusRequest()).status.conditions
    return next(one for one in conditions if one.type == "NetworkReady")
