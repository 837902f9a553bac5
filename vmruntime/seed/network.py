"""A pod's network as a guest is told it: cloud-init's network-config version 2, and OpenStack's network_data.json.

Not every route survives every cloud-init (tried: 22.4 of Debian 12, with its three renderers). One without a gateway
ends the configuration by an exception, so it is left out; the default route of IPv6 becomes one of ::/64; and a
gateway in no network of its interface is an error to systemd-networkd unless netplan passes `on-link` on. Commands
that run at every boot set those routes (again).
"""

from __future__ import annotations

import ipaddress
from typing import Any

from vmruntime.model.sandbox import Dns, NetworkInterface, NetworkRoute, PodNetwork

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def network_config(network: PodNetwork, dns: Dns) -> dict[str, Any]:
    """Return network-config version 2 (cloudinit.readthedocs.io, network-config-format-v2).

    Interfaces are found by MAC and get the names that they have in the pod. Servers and search domains belong to the
    first one: all of the pod's queries go there.
    """
    dns = _effective(network, dns)
    ethernets: dict[str, Any] = {}
    for number, nic in enumerate(network.interfaces):
        ethernet: dict[str, Any] = {
            "match": {"macaddress": nic.mac},
            "set-name": nic.name,
            "mtu": nic.mtu,
            "dhcp4": False,
            "dhcp6": False,
            "addresses": nic.addresses,
        }
        if nic.addresses:
            # CNI has given them all: no router may add one, and systemd need not wait 12 seconds for a router.
            ethernet["accept-ra"] = False
        routes = [_route(route, nic) for route in _routes(network, number) if route.gateway]
        if routes:
            ethernet["routes"] = routes
        servers = {"addresses": dns.servers, "search": dns.searches}
        if number == 0 and (dns.servers or dns.searches):
            ethernet["nameservers"] = {name: words for name, words in servers.items() if words}
        ethernets[nic.name] = ethernet
    return {"version": 2, "ethernets": ethernets}


def network_data(network: PodNetwork, dns: Dns) -> dict[str, Any]:
    """Return network_data.json (specs.openstack.org, metadata-service-network-info; cloud-init's `name` beside it)."""
    dns = _effective(network, dns)
    links: list[dict[str, Any]] = []
    networks: list[dict[str, Any]] = []
    for number, nic in enumerate(network.interfaces):
        links.append({"id": nic.name, "name": nic.name, "type": "phy", "ethernet_mac_address": nic.mac, "mtu": nic.mtu})
        routes = _routes(network, number)
        for version in (4, 6):
            # The routes of an interface go with its first address of their version.
            wanted = [route for route in routes if route.gateway and _version(route.destination) == version]
            remaining = [_long_route(route) for route in wanted]
            for address in map(ipaddress.ip_interface, nic.addresses):
                if address.version == version:
                    networks.append(_network(len(networks), nic.name, address, remaining))
                    remaining = []
    services: list[dict[str, Any]] = [{"type": "dns", "address": server} for server in dns.servers]
    if services and dns.searches:
        services[0]["search"] = dns.searches
    return {"links": links, "networks": networks, "services": services}


def route_commands(network: PodNetwork) -> list[list[str]]:
    """Return commands that set what cloud-init may not have set, in an order in which gateways can be reached."""
    commands = []
    for number, nic in enumerate(network.interfaces):
        # Routes without gateway first: they may lead to a gateway.
        for route in sorted(_routes(network, number), key=lambda route: route.gateway != ""):
            version = _version(route.destination)
            near = _near(route, nic)
            if near and not (version == 6 and route.destination == "::/0"):
                continue
            command = ["ip", f"-{version}", "route", "replace", route.destination]
            command += ["via", route.gateway] if route.gateway else []
            command += ["dev", nic.name, *(["onlink"] if route.gateway and not near else [])]
            commands.append(command)
    return commands


def _effective(network: PodNetwork, dns: Dns) -> Dns:
    """Return the pod's servers, else CNI's, as for other pods."""
    return dns if dns.servers else network.dns


def _routes(network: PodNetwork, number: int) -> list[NetworkRoute]:
    """Return the routes of an interface; one that names none is of the first."""
    name = network.interfaces[number].name
    return [route for route in network.routes if route.interface == name or (not route.interface and number == 0)]


def _route(route: NetworkRoute, nic: NetworkInterface) -> dict[str, Any]:
    # Calico's gateway, for one, is in no network of the pod.
    return {"to": route.destination, "via": route.gateway, **({} if _near(route, nic) else {"on-link": True})}


def _near(route: NetworkRoute, nic: NetworkInterface) -> bool:
    """Whether a route's gateway is in a network of its interface."""
    if not route.gateway:
        return False
    gateway = ipaddress.ip_address(route.gateway)
    return (gateway.is_link_local and gateway.version == 6) or any(
        gateway in ipaddress.ip_interface(address).network for address in nic.addresses
    )


def _network(number: int, link: str, address: Interface, routes: list[dict[str, str]]) -> dict[str, Any]:
    name = f"network{number}"
    return {
        "id": name,
        "network_id": name,
        "link": link,
        "type": f"ipv{address.version}",
        "ip_address": str(address.ip),
        "netmask": str(address.netmask),
        "routes": routes,
    }


def _long_route(route: NetworkRoute) -> dict[str, str]:
    network = ipaddress.ip_network(route.destination)
    return {"network": str(network.network_address), "netmask": str(network.netmask), "gateway": route.gateway}


def _version(destination: str) -> int:
    return ipaddress.ip_network(destination).version
