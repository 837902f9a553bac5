"""Pod networks: a namespace, CNI's chain, and a tap for each interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import structlog

from vmruntime.config.settings import NetworkSettings
from vmruntime.errors import VmruntimeError
from vmruntime.model.sandbox import NetworkInterface, NetworkRoute, PodNetwork, PortMapping, Sandbox, SandboxKind
from vmruntime.network import conf as configuration
from vmruntime.network import netns
from vmruntime.network.cni import Attachment, Cni
from vmruntime.network.errors import NetworkError
from vmruntime.network.result import CniResult
from vmruntime.network.tap import TapHandle, link, open_tap, tap_name
from vmruntime.network.turn import turn
from vmruntime.paths import Paths

log = structlog.get_logger(__name__)

IFNAME = "eth0"
NEW = ".new"


class NetworkService:
    """Implements pods.ports.Network."""

    def __init__(self, paths: Paths, settings: NetworkSettings) -> None:
        self._paths = paths
        self._settings = settings
        self._cni = Cni(settings.bin_dirs, settings.plugin_timeout)

    def netns_path(self, sandbox_id: str) -> Path:
        """Return where a pod's network namespace is."""
        return self._paths.netns / f"vmrt-{sandbox_id[:13]}"

    async def ready(self) -> tuple[bool, str]:
        """Return whether pods can get an address, and why not."""
        try:
            found = self._find()
        except VmruntimeError as error:
            return False, str(error)
        missing = self._cni.missing(found)
        if missing:
            return False, f"network {found.name} ({found.source}): plugins not installed: {', '.join(missing)}"
        return True, ""

    async def add(self, sandbox: Sandbox) -> tuple[PodNetwork, list[TapHandle]]:
        """Make the pod's namespace, run CNI ADD and open taps; on failure nothing stays.

        Raises:
            NetworkError: With the plugin's words.
        """
        conf = self._find()
        namespace = self.netns_path(sandbox.id)
        attachment = Attachment(
            container_id=sandbox.id,
            netns=str(namespace),
            ifname=IFNAME,
            conf=conf,
            args=_cni_args(sandbox),
            capabilities=_capabilities(sandbox.spec.port_mappings),
        )
        self._save(attachment)  # first, so that DEL can always be run
        taps: list[TapHandle] = []
        try:
            await netns.create(namespace)
            async with turn(self._lock(sandbox.id), self._settings.plugin_timeout) as lock:
                result = await self._cni.add(attachment, lock)
            self._save(attachment)
            plugs = taps if sandbox.spec.kind is not SandboxKind.HOST else None
            return await self._join(namespace, result, plugs), taps
        except BaseException as error:
            for tap in taps:
                tap.close()
            try:
                await self.teardown(sandbox.id)
            except VmruntimeError as second:
                error.add_note(f"cleaning up failed too: {second}")
            raise

    async def teardown(self, sandbox_id: str) -> None:
        """Run DEL with the cached configuration and result, then remove the namespace; nothing left: success.

        Raises:
            NetworkError: Something could not be released; the cache stays, so that a later call tries again.
        """
        attachment = self._load(sandbox_id)
        failures = []
        async with turn(self._lock(sandbox_id), self._settings.plugin_timeout) as lock:
            if attachment is not None:
                try:
                    await self._cni.delete(attachment, lock)
                except VmruntimeError as error:
                    failures.append(str(error))
            try:
                await netns.remove(self.netns_path(sandbox_id))
            except VmruntimeError as error:
                failures.append(str(error))
            if failures:
                raise NetworkError("; ".join(failures))
            cache = self._cache(sandbox_id)
            # The lock last: who comes next waits for it. The half-written one is a killed daemon's.
            for path in (cache.with_suffix(NEW), cache, self._lock(sandbox_id)):
                path.unlink(missing_ok=True)

    async def _join(self, namespace: Path, result: CniResult, taps: list[TapHandle] | None) -> PodNetwork:
        """Return the pod's interfaces; with `taps`, a tap beside each is added to it."""
        nics = []
        for name in result.interfaces:
            nic = await link(namespace, name)
            if taps is not None:
                taps.append(await open_tap(namespace, nic))
            nics.append(
                NetworkInterface(
                    name=name,
                    mac=nic.address,
                    mtu=nic.mtu,
                    addresses=[one.address for one in result.addresses if one.interface == name],
                    tap=tap_name(name) if taps is not None else "",
                )
            )
        return PodNetwork(netns=str(namespace), interfaces=nics, routes=_routes(result), dns=result.dns)

    def _find(self) -> configuration.NetworkConf:
        found = configuration.find(Path(self._settings.conf_dir), self._settings.default_subnet)
        for reason in found.skipped:
            log.warning("CNI configuration skipped", reason=reason)
        return found.conf

    def _cache(self, sandbox_id: str) -> Path:
        return self._paths.cni_cache / f"{sandbox_id}.json"

    def _lock(self, sandbox_id: str) -> Path:
        return self._paths.cni_cache / f"{sandbox_id}.lock"

    def _save(self, attachment: Attachment) -> None:
        """Write the cache: all of it or nothing, and on the disk before it counts."""
        path = self._cache(attachment.container_id)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_suffix(NEW)
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(attachment))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _load(self, sandbox_id: str) -> Attachment | None:
        try:
            return msgspec.json.decode(self._cache(sandbox_id).read_bytes(), type=Attachment)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            log.error("CNI cache unreadable", file=str(self._cache(sandbox_id)), error=str(error))
            return None


def _cni_args(sandbox: Sandbox) -> str:
    metadata = sandbox.spec.metadata
    arguments = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": metadata.namespace,
        "K8S_POD_NAME": metadata.name,
        "K8S_POD_INFRA_CONTAINER_ID": sandbox.id,
        "K8S_POD_UID": metadata.uid,
    }
    return ";".join(f"{key}={value}" for key, value in arguments.items() if not set(";=") & set(value))


def _capabilities(mappings: list[PortMapping]) -> dict[str, Any]:
    ports = [
        {
            "hostPort": mapping.host_port,
            "containerPort": mapping.container_port,
            "protocol": mapping.protocol.lower(),
            **({"hostIP": mapping.host_ip} if mapping.host_ip else {}),
        }
        for mapping in mappings
        if mapping.host_port > 0
    ]
    return {"portMappings": ports} if ports else {}


def _routes(result: CniResult) -> list[NetworkRoute]:
    """Return the result's routes; one without a gateway uses that of the first address of its family."""
    routes = []
    for route in result.routes:
        v6 = ":" in route.destination
        gateway = route.gateway
        interface = result.interfaces[0]
        for address in result.addresses:
            if (":" in address.address) == v6:
                gateway = gateway or address.gateway
                interface = address.interface
                break
        routes.append(NetworkRoute(destination=route.destination, gateway=gateway, interface=interface))
    return routes
