"""Whatever is in a file and whatever a plugin prints: it is understood, or it is refused in our words."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from vmruntime.network.conf import SUPPORTED_VERSIONS, NetworkConf, parse, valid_plugin_name
from vmruntime.network.errors import NetworkConfigError, NetworkError
from vmruntime.network.plugins import answer
from vmruntime.network.result import CniResult, valid_ifname
from vmruntime.network.result import parse as parse_result

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["eth0", "net1", "lo", "", "a/b", "eth%d", "x" * 16, "..", "a b"]) | st.text(max_size=18)
PLUGIN_NAMES = st.sampled_from(["bridge", "host-local", "../sh", "", "loopback", "/bin/sh", "a\0b"]) | st.text(
    max_size=9
)
IPS = st.ip_addresses().map(str) | st.sampled_from(["", "x", "0.0.0.0", "::", "fe80::1%1", "127.0.0.1", "ff02::1"])
CIDRS = (
    st.tuples(st.ip_addresses().map(str), st.integers(-1, 129)).map(lambda pair: f"{pair[0]}/{pair[1]}")
    | IPS
    | st.text(max_size=10)
)
INDICES = st.none() | st.integers(-2, 4)


def objects(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return objects with some of these keys, now and then of another form altogether."""
    wild = {key: values | JSON for key, values in keys.items()}
    return st.fixed_dictionaries({}, optional=keys) | st.fixed_dictionaries({}, optional=wild) | JSON


ROUTES = st.lists(objects(dst=CIDRS, gw=IPS, table=INDICES, priority=INDICES, mtu=INDICES), max_size=4)
FAMILIES = objects(ip=CIDRS, gateway=IPS, routes=ROUTES)
RESULTS = objects(
    cniVersion=st.sampled_from(SUPPORTED_VERSIONS),
    interfaces=st.lists(objects(name=NAMES, sandbox=st.sampled_from(["", "/run/netns/x"]), mtu=INDICES), max_size=4),
    ips=st.lists(objects(address=CIDRS, gateway=IPS, interface=INDICES), max_size=4),
    routes=ROUTES,
    dns=objects(
        nameservers=st.lists(IPS, max_size=3),
        domain=st.text(max_size=9),
        search=st.lists(st.text(max_size=9), max_size=3),
        options=st.lists(st.text(max_size=9), max_size=3),
    ),
    ip4=FAMILIES,
    ip6=FAMILIES,
)
PLUGINS = objects(type=PLUGIN_NAMES, ipam=objects(type=PLUGIN_NAMES), capabilities=objects(portMappings=st.booleans()))
CONFIGURATIONS = objects(
    name=st.sampled_from(["net", "a b", ""]) | st.text(max_size=9),
    cniVersion=st.sampled_from([*SUPPORTED_VERSIONS, "", "2.0.0"]),
    cniVersions=st.lists(st.sampled_from([*SUPPORTED_VERSIONS, "x"]), max_size=3),
    plugins=st.lists(PLUGINS, max_size=3),
    type=PLUGIN_NAMES,
    disableCheck=st.booleans() | st.sampled_from(["true", "no"]),
    disableGC=st.booleans() | st.sampled_from(["true", "no"]),
)


@settings(max_examples=examples(150), deadline=None)
@given(RESULTS)
def test_results(raw: object) -> None:
    try:
        result = parse_result(raw, "eth0", "network n (f)")
    except NetworkError as error:
        assert error.message.startswith("network n (f): ")
        return
    check_usable(result)


def check_usable(result: CniResult) -> None:
    """Check that a guest can do all of it."""
    assert result.interfaces
    assert result.addresses
    assert all(valid_ifname(name) and name != "lo" for name in result.interfaces)
    for address in result.addresses:
        assert address.interface in result.interfaces
        ip = ipaddress.ip_interface(address.address)
        assert "/" in address.address
        assert ip.network.prefixlen
        assert not any((ip.is_multicast, ip.is_loopback, ip.is_unspecified))
        assert not address.gateway or ipaddress.ip_address(address.gateway)
    for route in result.routes:
        network = ipaddress.ip_network(route.destination)
        assert not route.gateway or ipaddress.ip_address(route.gateway).version == network.version
        assert 0 <= route.metric < 2**32
        assert 0 <= route.mtu < 2**16
    words = (*result.dns.servers, *result.dns.searches, *result.dns.options)
    assert all(word and word.isascii() and word.isprintable() and " " not in word for word in words)
    assert all(ipaddress.ip_address(server) for server in result.dns.servers)


@settings(max_examples=examples(100), deadline=None)
@given(CONFIGURATIONS)
def test_configurations(raw: object) -> None:
    try:
        conf = parse(raw, "f.conflist")
    except NetworkConfigError as error:
        assert error.message.startswith("f.conflist: ")
        return
    assert conf.cni_version in SUPPORTED_VERSIONS
    assert conf.plugins
    assert all(valid_plugin_name(name) for name in conf.programs)
    assert msgspec.json.decode(msgspec.json.encode(conf), type=NetworkConf).name == conf.name


@settings(max_examples=examples(100), deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()) | RESULTS.map(msgspec.json.encode))
def test_answers(printed: bytes) -> None:
    try:
        raw = answer(printed, "network n: x ADD")
    except NetworkError as error:
        assert error.message.startswith("network n: x ADD answered ")
        return
    try:
        check_usable(parse_result(raw, "eth0", "network n (f)"))
    except NetworkError as error:
        assert error.message.startswith("network n (f): ")
