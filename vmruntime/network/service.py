"""Pod networks: a namespace, CNI's chain, and a tap for each interface."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from pathlib import Path

import structlog

from vmruntime import tracing
from vmruntime.aio.beside import together
from vmruntime.aio.pipeline import in_thread
from vmruntime.config.settings import NetworkSettings
from vmruntime.errors import Code, VmruntimeError
from vmruntime.model.sandbox import NetworkInterface, PodNetwork, Sandbox, SandboxKind, UserNamespace
from vmruntime.network import conf as configuration
from vmruntime.network import netns
from vmruntime.network.attachments import Attachment, Attachments
from vmruntime.network.capabilities import BANDWIDTH, PORT_MAPPINGS, capabilities, cni_args
from vmruntime.network.cni import Cni
from vmruntime.network.errors import NetworkConfigError, NetworkError
from vmruntime.network.plugins import Plugins
from vmruntime.network.readback import read
from vmruntime.network.result import CniResult
from vmruntime.network.rtnetlink import Rtnetlink
from vmruntime.network.survey import Survey, survey
from vmruntime.network.tap import SpareTap, TapHandle, join_tap, open_tap, spare_tap, tap_name
from vmruntime.network.template import FILE_NAME, render, write
from vmruntime.network.turn import turn
from vmruntime.paths import Paths

log = structlog.get_logger(__name__)

IFNAME = "eth0"


class NetworkService:
    """Implements pods.ports.Network."""

    def __init__(self, paths: Paths, settings: NetworkSettings) -> None:
        self._paths = paths
        self._settings = settings
        self._cni = Cni(Plugins(settings.bin_dirs, settings.plugin_timeout))
        self._attachments = Attachments(paths.cni_cache)
        self._skipped: tuple[str, ...] = ()
        self._template_error = ""

    def netns_path(self, sandbox_id: str) -> Path:
        """Return where a pod's network namespace is."""
        return self._paths.pod_netns(sandbox_id)

    async def ready(self) -> tuple[bool, str]:
        """Return whether pods can get an address, and why not: by the files as they are now, and by STATUS."""
        try:
            await self._cni.status(await self._usable())
        except VmruntimeError as error:
            return False, str(error)
        return True, ""

    async def use_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """Make a configuration of network.conf_template, unless another one than ours can be used.

        Raises:
            NetworkConfigError: The template cannot be used.
            NetworkError: The file cannot be written.
        """
        template = self._settings.conf_template
        if not template:
            log.info("pod CIDR noted: addresses come from the CNI configuration", pod_cidrs=cidrs)
            return
        try:
            await in_thread(lambda: self._fill_in(Path(template), cidrs))
        except VmruntimeError as error:
            self._template_error = str(error)
            raise
        self._template_error = ""

    def _fill_in(self, template: Path, cidrs: Sequence[str]) -> None:
        directory = Path(self._settings.conf_dir)
        with contextlib.suppress(NetworkConfigError):  # nothing of use there, like nothing at all
            other = configuration.find(directory, self._settings.default_subnet, but=FILE_NAME).conf
            if other.source != configuration.BUILT_IN:
                log.info("network.conf_template is not used beside another configuration", other=other.source)
                return
        text, conf = render(template, cidrs)
        if write(text, directory):
            log.info("CNI configuration made of network.conf_template", network=conf.name, pod_cidrs=cidrs)

    async def spare_tap(self) -> SpareTap:
        """Make a tap for a VM whose pod is not known, or has no network yet; the caller closes it.

        Raises:
            NetworkError: The kernel refuses.
        """
        return await spare_tap()

    async def add(self, sandbox: Sandbox, spare: SpareTap | None = None) -> tuple[PodNetwork, list[TapHandle]]:
        """Make the pod's namespace, run CNI ADD and make taps; on failure nothing stays.

        Args:
            sandbox: The pod.
            spare: A new tap of the pod's VM, to be that of its first interface; of no use when this fails. Still the
                caller's to close. Image pods and host pods leave it alone.

        Returns:
            The network, and the taps, open: those but the spare one; none of an image pod's, which open_taps() opens for
            each of its VMs.

        Raises:
            NetworkConfigError: There is no network to join; nothing was begun.
            NetworkError: With the plugin's words.
        """
        conf = await self._usable()
        namespace = self.netns_path(sandbox.id)
        attachment = Attachment(
            container_id=sandbox.id,
            netns=str(namespace),
            ifname=IFNAME,
            conf=conf,
            args=cni_args(sandbox),
            capabilities=capabilities(sandbox.spec),
        )
        unheard = {PORT_MAPPINGS, BANDWIDTH} & attachment.capabilities.keys() - conf.capabilities
        if unheard:
            log.warning("the pod's network does not do what it asks for", sandbox=sandbox.id, lacks=sorted(unheard))
        spare = spare if sandbox.spec.kind is SandboxKind.CONTAINER else None
        taps: list[TapHandle] = []
        try:
            await self._attachments.save(attachment, on_disk=False)  # first, so that DEL can always be run
            with tracing.span("network.netns"):
                if spare is not None:
                    await in_thread(lambda: netns.name(spare.namespace, namespace))
                else:
                    await netns.create(namespace, _owner(sandbox))
            result = await self._attach(attachment)
            network = await self._finish(attachment, result, sandbox.spec.kind, spare, taps)
            return network, taps
        except BaseException as error:
            _close(taps)
            try:
                await self.teardown(sandbox.id)
            except VmruntimeError as second:
                error.add_note(f"cleaning up failed too: {second}")
            raise

    async def _attach(self, attachment: Attachment) -> CniResult:
        """Run ADD, and have the attachment on the disk meanwhile.

        What the plugins keep on the host's disk gets there no sooner. Only an address kept elsewhere could stay taken, if
        the host crashed right now.
        """
        results: list[CniResult] = []

        async def add() -> None:
            lock_file = self._attachments.lock(attachment.container_id)
            async with turn(lock_file, self._settings.plugin_timeout) as lock:
                results.append(await self._cni.add(attachment, lock))

        await together(add(), self._attachments.keep(attachment.container_id))
        return results[0]

    async def _finish(
        self,
        attachment: Attachment,
        result: CniResult,
        kind: SandboxKind,
        spare: SpareTap | None,
        taps: list[TapHandle],
    ) -> PodNetwork:
        """Write down what ADD gave, and join it with taps meanwhile."""
        network = PodNetwork(netns=attachment.netns)

        def join() -> None:
            nonlocal network
            with Rtnetlink() as kernel:
                with tracing.span("network.survey"):
                    network = _pod_network(network.netns, survey(read(kernel), result), result, kind, spare)
                others = network.interfaces
                with tracing.span("network.taps"):
                    if spare is not None and others:
                        join_tap(kernel, others[0], spare.index)
                        others = others[1:]
                    _open_taps(kernel, others, taps, persistent=kind is SandboxKind.IMAGE)
                if kind is SandboxKind.IMAGE:
                    _close(taps)

        await together(self._attachments.save(attachment), netns.inside(Path(attachment.netns), join))
        return network

    async def open_taps(self, sandbox: Sandbox) -> list[TapHandle]:
        """Open the taps of an image pod, in the order of its interfaces; one that is gone is made again.

        Raises:
            NetworkError: A VM has one open, or the pod's network is gone; none stays open.
        """
        network = sandbox.network
        if network is None or not Path(network.netns).exists():
            raise NetworkError(
                f"the network of pod {sandbox.id[:13]} is gone", remedy="remove the pod", code=Code.FAILED_PRECONDITION
            )
        taps: list[TapHandle] = []

        def open_all() -> None:
            with Rtnetlink() as kernel:
                _open_taps(kernel, network.interfaces, taps, persistent=True)

        try:
            await netns.inside(Path(network.netns), open_all)
        except BaseException:
            _close(taps)
            raise
        return taps

    async def teardown(self, sandbox_id: str) -> None:
        """Run DEL with the cached configuration and result, then remove the namespace; nothing left: success.

        Raises:
            NetworkError: Something could not be released; the cache stays, so that a later call tries again.
        """
        failures = []
        async with turn(self._attachments.lock(sandbox_id), self._settings.plugin_timeout) as lock:
            attachment = await self._attachments.load(sandbox_id)
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
            await self._attachments.forget(sandbox_id)

    async def check(self, sandbox_id: str) -> bool:
        """Run CHECK with the cached configuration and result; see Cni.check().

        Returns:
            Whether there was something to check.

        Raises:
            NetworkError: The pod's network is not as it was made.
        """
        if await self._attachments.load(sandbox_id) is None:
            return False
        lock_file = self._attachments.lock(sandbox_id)
        async with turn(lock_file, self._settings.plugin_timeout) as lock:
            attachment = await self._attachments.load(sandbox_id)
            if attachment is None:  # the pod ended while we waited
                lock_file.unlink(missing_ok=True)
                return False
            return await self._cni.check(attachment, lock)

    async def collect(self, keep: Collection[str]) -> None:
        """Release attachments of sandboxes that nobody knows, and let plugins do the same with what they hold.

        Nothing may be added meanwhile: plugins would take it away again.

        Args:
            keep: Ids of every sandbox that has a network, or may have one.

        Raises:
            NetworkError: Something could not be released.
        """
        attachments, unreadable = await self._attachments.all()
        failures = []
        for attachment in attachments:
            if attachment.container_id not in keep:
                log.warning("releasing a network nobody owns", sandbox=attachment.container_id)
                try:
                    await self.teardown(attachment.container_id)
                except NetworkError as error:
                    failures.append(str(error))
        if lost := unreadable.intersection(keep):
            failures.append(
                f"no garbage collection by CNI plugins: it would take their addresses from {', '.join(sorted(lost))}, whose"
                f" files in {self._paths.cni_cache} cannot be read"
            )
        else:
            await self._collect_garbage(attachments, keep)
        if failures:
            raise NetworkError("; ".join(failures))

    async def _collect_garbage(self, attachments: list[Attachment], keep: Collection[str]) -> None:
        """Let plugins release what they hold for none of these attachments."""
        conf = await self._usable()
        valid = [one for one in attachments if one.conf.name == conf.name and one.container_id in keep]
        if await self._cni.collect(conf, valid):
            log.info("CNI plugins have collected garbage", network=conf.name, valid=len(valid))

    @tracing.timed("network.conf")
    async def _usable(self) -> configuration.NetworkConf:
        """Return the network that pods join now.

        Raises:
            NetworkConfigError: There is none, or its plugins are not installed or of another time.
        """
        settings = self._settings

        def look() -> tuple[configuration.Found, list[str]]:
            found = configuration.find(Path(settings.conf_dir), settings.default_subnet)
            return found, self._cni.missing(found.conf)

        found, missing = await in_thread(look)
        if found.skipped != self._skipped:
            self._skipped = found.skipped
            for reason in found.skipped:
                log.warning("CNI configuration skipped", reason=reason)
        conf = found.conf
        if settings.conf_template and conf.source == configuration.BUILT_IN:
            raise NetworkConfigError(
                self._template_error
                or f"no CNI configuration in {settings.conf_dir}: network.conf_template waits for kubelet's pod CIDR"
            )
        if missing:
            raise NetworkConfigError(
                f"{conf.where}: plugins not installed: {', '.join(missing)}; they are in none of "
                + ", ".join(settings.bin_dirs),
                remedy="install containernetworking-plugins, or set network.bin_dirs",
            )
        return await self._cni.negotiated(conf)


def _owner(sandbox: Sandbox) -> UserNamespace | None:
    """Return whose the namespace is: in a VM containers have the guest's network, which is another."""
    return sandbox.spec.namespaces.user_namespace if sandbox.spec.kind is SandboxKind.HOST else None


def _pod_network(
    namespace: str, seen: Survey, result: CniResult, kind: SandboxKind, spare: SpareTap | None
) -> PodNetwork:
    """Return what CNI made; all but host pods have a tap beside each interface."""
    interfaces = [
        NetworkInterface(
            name=nic.name,
            mac=nic.mac,
            device_mac=spare.mac if spare is not None and position == 0 else "",
            mtu=nic.mtu,
            addresses=nic.addresses,
            neighbours=nic.neighbours,
            tap=tap_name(nic.index) if kind is not SandboxKind.HOST else "",
        )
        for position, nic in enumerate(seen.nics)
    ]
    return PodNetwork(netns=namespace, interfaces=interfaces, routes=seen.routes, dns=result.dns)


def _open_taps(
    kernel: Rtnetlink, interfaces: Sequence[NetworkInterface], taps: list[TapHandle], *, persistent: bool
) -> None:
    """Open the taps of interfaces that have one and add each to `taps`, which the caller closes on failure."""
    for nic in interfaces:
        if nic.tap:
            taps.append(open_tap(kernel, nic, persistent=persistent))


def _close(taps: list[TapHandle]) -> None:
    """Close taps and forget them."""
    for tap in taps:
        tap.close()
    taps.clear()
