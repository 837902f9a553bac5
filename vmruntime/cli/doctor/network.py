"""Pods' networks: CNI, taps, and the kernel's parts of both."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.programs import program
from vmruntime.cli.doctor.report import Capability, Check, degraded, found, missing
from vmruntime.config.settings import Settings
from vmruntime.network.cni import choose_version
from vmruntime.network.conf import BUILT_IN, NetworkConf, find
from vmruntime.network.errors import NetworkConfigError
from vmruntime.network.plugins import find_programs, spoken_versions
from vmruntime.network.template import render

EXAMPLE_CIDRS = ("10.244.0.0/24", "fd00:10:244::/64")

TC_MODULES = {
    "sch_ingress": "CONFIG_NET_SCH_INGRESS",
    "cls_u32": "CONFIG_NET_CLS_U32",
    "act_mirred": "CONFIG_NET_ACT_MIRRED",
}
"""What joins the CNI interface and the tap: modules, and the kernel's options for them."""


def cni_configuration(host: Host, settings: Settings) -> Capability:
    """Whether there is a network for pods: configured, or the built-in one."""
    directory = settings.network.conf_dir
    try:
        chosen = find(host.path(directory), settings.network.default_subnet)
    except NetworkConfigError as error:
        return missing("cni configuration", error.message, error.remedy)
    if chosen.skipped:
        return degraded("cni configuration", "; ".join(chosen.skipped), "correct or remove these files")
    template = settings.network.conf_template
    if template and chosen.conf.source == BUILT_IN:
        try:
            render(host.path(template), EXAMPLE_CIDRS)
        except NetworkConfigError as error:
            return missing("cni configuration", error.message, error.remedy)
        why = f"none in {directory}: {template} waits for kubelet's pod CIDR"
        return degraded("cni configuration", why, "allocate pod CIDRs to nodes (kube-controller-manager)")
    if chosen.conf.source == BUILT_IN:
        why = f"none in {directory}: the built-in bridge is used, with {settings.network.default_subnet}"
        return found("cni configuration", why)
    return found("cni configuration", f"network {chosen.conf.name!r} from {chosen.conf.source}")


def cni_plugins(host: Host, settings: Settings) -> Capability:
    """Whether the plugins are installed that the network names, and agree with it on a version of CNI."""
    conf = _network(host, settings)
    if conf is None:
        return missing("cni plugins", "cannot be judged without a configuration", "see cni configuration")
    # kubelet's own networks expect loopback, whatever the configuration says.
    wanted = list(dict.fromkeys([*conf.programs, "loopback"]))
    directories = [str(host.path(directory)) for directory in settings.network.bin_dirs]
    paths, absent = find_programs(wanted, directories)
    if absent == ["loopback"]:
        return degraded("cni plugins", "loopback is not installed", "apt install containernetworking-plugins")
    if absent:
        places = ", ".join(settings.network.bin_dirs)
        return missing("cni plugins", f"{', '.join(absent)} not in {places}", "apt install containernetworking-plugins")
    try:
        version = choose_version(conf, {name: _spoken(host, paths[name]) for name in conf.programs}).cni_version
    except NetworkConfigError as error:
        return missing("cni plugins", error.message, error.remedy)
    return found("cni plugins", f"{', '.join(wanted)} (CNI {version})")


def iptables(host: Host, settings: Settings) -> Capability:
    """Whether the plugins can masquerade and map ports."""
    path = host.which("iptables")
    if path is not None:
        return found("iptables", path)
    conf = _network(host, settings)
    needed = conf is None or any(
        plugin.get("ipMasq") is True or plugin["type"] in ("portmap", "firewall") for plugin in conf.plugins
    )
    why = "not installed; the CNI plugins masquerade and map ports with it"
    return missing("iptables", why, "apt install iptables", essential=needed)


def tun(host: Host, settings: Settings) -> Capability:
    """Whether taps can be made, which are the guests' network cards."""
    device = host.path("/dev/net/tun")
    if not device.exists():
        return missing("tun", "/dev/net/tun does not exist", "modprobe tun")
    trouble = host.open_device(device)
    if trouble:
        return missing("tun", f"/dev/net/tun: {trouble}", "run doctor as root; modprobe tun")
    return found("tun", "/dev/net/tun opens")


def traffic_control(host: Host, settings: Settings) -> Capability:
    """Whether packets can be led between the CNI interface and the tap."""
    states = {name: _module(host, name, option) for name, option in TC_MODULES.items()}
    absent = [name for name, state in states.items() if state == "absent"]
    unknown = [name for name, state in states.items() if state == "unknown"]
    if absent:
        return missing(
            "traffic control",
            f"this kernel has no {', '.join(absent)}",
            "install the kernel's extra modules (linux-modules-extra-… on Ubuntu)",
        )
    if unknown:
        return degraded(
            "traffic control",
            f"cannot see from here whether the kernel has {', '.join(unknown)}",
            "the first pod will tell: modprobe " + " ".join(TC_MODULES),
        )
    return found("traffic control", ", ".join(f"{name} {state}" for name, state in states.items()))


def _network(host: Host, settings: Settings) -> NetworkConf | None:
    try:
        return find(host.path(settings.network.conf_dir), settings.network.default_subnet).conf
    except NetworkConfigError:
        return None


def _spoken(host: Host, program: Path) -> frozenset[str] | None:
    printed = host.run(["env", "CNI_COMMAND=VERSION", str(program)])
    return None if printed is None else spoken_versions(printed.encode())


def _module(host: Host, name: str, option: str) -> str:
    """Return how the kernel has a module: loaded, built in, loadable, absent; unknown where nothing tells."""
    if host.path(f"/sys/module/{name}").exists():
        return "loaded"
    release = (host.read("/proc/sys/kernel/osrelease") or "").strip()
    for file, state in (("modules.builtin", "built in"), ("modules.dep", "loadable")):
        text = host.read(f"/lib/modules/{release}/{file}")
        if text is None:
            return _configured(host, release, option)
        if any(f"/{name}.ko" in line.split(":", 1)[0] for line in text.splitlines()):
            return state
    return "absent"


def _configured(host: Host, release: str, option: str) -> str:
    """Return the same from the kernel's configuration: all there is where the modules' lists are not installed."""
    text = host.read(f"/boot/config-{release}")
    if text is None:
        try:
            text = gzip.decompress(host.path("/proc/config.gz").read_bytes()).decode(errors="replace")
        except (OSError, EOFError, zlib.error):
            return "unknown"
    # A module that cannot be loaded from here may still be by the host whose kernel this is.
    states = {f"{option}=y": "built in", f"{option}=m": "unknown"}
    return next((states[line] for line in text.splitlines() if line in states), "absent")


CHECKS: tuple[Check, ...] = (
    cni_configuration,
    cni_plugins,
    iptables,
    program("ip", "shows the pods' networks in bug reports", "iproute2", essential=False),
    program("tc", "shows the pods' networks in bug reports", "iproute2", essential=False),
    program("dnsmasq", "answers the DHCP requests of image pods", "dnsmasq-base", essential=False),
    tun,
    traffic_control,
)
