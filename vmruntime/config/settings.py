"""What the configuration file may say, with defaults that need no file at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]


class HypervisorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [hypervisor] table.

    Attributes:
        user: Account QEMU and its helpers run as.
        accelerator: "auto" proves KVM by booting the guest once per host boot, else TCG.
        vsock: "auto" uses /dev/vhost-vsock where it works, else vhost-device-vsock.
        boot_timeout: Seconds from starting QEMU to the agent's first answer.
        vhost_device_vsock: The helper program; found on PATH or in /usr/local/libexec/vmruntime when empty.
        ksm: Let the host's kernel merge equal pages of VMs that share a template's memory (KSM); pods can then find out, by
            how long a write takes, which pages others have.
        image_pods: Who runs the VMs of image pods; "auto": libvirt if its library is there, else QEMU by itself.
        libvirt_uri: Empty: qemu:///system when a libvirtd answers, else a driver inside the daemon (qemu:///embed).
    """

    user: str = "vmruntime"
    qemu: str = ""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    vsock: Literal["auto", "native", "vhost-user"] = "auto"
    boot_timeout: Annotated[float, Meta(gt=0)] = 60.0
    vhost_device_vsock: str = ""
    ksm: bool = False
    image_pods: Literal["auto", "libvirt", "qemu"] = "auto"
    libvirt_uri: str = ""


class GuestSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [guest] table.

    Attributes:
        directory: Where vmlinuz and initramfs.img are; empty: ROOT/guest.
        default_vcpus, default_memory_mib: For pods without limits.
        image_memory_mib: For image pods without limits.
        scratch_gib: Size limit of a pod's writable layers; the file is sparse.
        kernel_args: Added to the guest's kernel command line.
    """

    directory: str = ""
    default_vcpus: Annotated[int, Meta(ge=1, le=255)] = 1
    default_memory_mib: Annotated[int, Meta(ge=64)] = 512
    overhead_memory_mib: Annotated[int, Meta(ge=0)] = 96
    image_memory_mib: Annotated[int, Meta(ge=64)] = 1024
    scratch_gib: Positive = 10
    kernel_args: str = ""


class StartSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [start] table: where container pods get their booted guests.

    Attributes:
        source: "auto": a VM that waits for a pod, else a guest brought back from a template, else one that boots;
            "template": no VMs wait; "cold": all boot.
        warm: How many VMs wait for pods; "auto": as many as processors, at most four, and no more than 2 % of the host's
            memory has room for. None do while the host is short of memory.
    """

    source: Literal["auto", "template", "cold"] = "auto"
    warm: Annotated[int, Meta(ge=0, le=64)] | Literal["auto"] = "auto"


class ImageSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [images] table.

    Attributes:
        policy: containers-policy.json(5); empty: the host's, else accept (as skopeo needs one).
        registries_conf: containers-registries.conf(5); empty: the host's.
        registries_d: Where signatures are kept, a containers-registries.d(5) directory; empty: the host's.
        pull_timeout: Seconds without any progress of a pull.
        max_layer_gib: Refuse an image with a larger unpacked layer.
        prune_after_days: Images that nobody has used for so long are removed; 0: never, as kubelet does that.
        pinned: Images that are never collected: names, or patterns in which "*" stands for anything.
        translations_dir: Where names of VM images are translated to URLs (images/translation.py).
        max_disk_gib: Refuse a VM image whose guest would see a larger disk.
    """

    policy: str = ""
    registries_conf: str = ""
    registries_d: str = ""
    pull_timeout: Annotated[float, Meta(gt=0)] = 300.0
    max_layer_gib: Positive = 64
    prune_after_days: Annotated[float, Meta(ge=0)] = 0.0
    pinned: list[str] = []
    translations_dir: str = "/etc/vmruntime/images.d"
    max_disk_gib: Positive = 1024


class NetworkSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [network] table.

    Attributes:
        conf_dir: CNI configuration lists, first by name wins.
        conf_template: Becomes a file in conf_dir once kubelet tells the pod CIDR, while nothing else is there; empty: none.
        bin_dirs: Where CNI plugins are.
        default_subnet: Pod addresses of the built-in bridge, used while conf_dir has no configuration; one of each IP
            version, separated by a comma, gives pods both.
    """

    conf_dir: str = "/etc/cni/net.d"
    conf_template: str = ""
    bin_dirs: list[str] = msgspec.field(default_factory=lambda: ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"])
    default_subnet: str = "10.88.0.0/16"
    plugin_timeout: Annotated[float, Meta(gt=0)] = 60.0


class VolumeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [volumes] table.

    Attributes:
        virtiofsd: The program; empty: where distributions put it.
    """

    virtiofsd: str = ""


class StreamingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [streaming] table: the server behind the URLs that Exec, Attach and PortForward answer.

    Attributes:
        address: IP address to listen on; kubelet, which connects, is on the same host.
        port: 0 takes any free one.
        tls_cert, tls_key: PEM files; empty: no TLS.
    """

    address: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    tls_cert: str = ""
    tls_key: str = ""


class HostSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [host] table: host pods.

    Attributes:
        agent, crun: Programs; empty: in /usr/local/libexec/vmruntime, else on PATH.
    """

    agent: str = ""
    crun: str = ""


class MetricsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [metrics] table: the endpoint for Prometheus.

    Attributes:
        address: IP address to listen on; empty: no endpoint.
    """

    address: str = ""
    port: Annotated[int, Meta(ge=1, le=65535)] = 9743


class TracingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [tracing] table: spans for an OpenTelemetry collector; the names are those of kubelet's TracingConfiguration.

    Attributes:
        endpoint: host:port, or a URL with http or https, of OTLP over gRPC; empty: no tracing.
        sampling_rate_per_million: Of calls that come without a trace; a caller's own decision holds.
    """

    endpoint: str = ""
    sampling_rate_per_million: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The [log] table: the daemon's own messages on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file, /etc/vmruntime/config.toml by default.

    Attributes:
        root, run: See vmruntime.paths.
        socket: CRI socket; empty: RUN/vmruntime.sock.
        default_kind: What boots for a pod that does not say.
        host_pods: "required" runs pods that need the host's namespaces on the host, "privileged" privileged ones as
            well, "never" none.
        cgroup_parent: Where pods go that kubelet gives no cgroup.
        hooks_dirs: Directories of OCI hooks, oci-hooks(5); a later one takes precedence.
        hooks_in_vms: What becomes of a container in a VM that a hook of the host matches.
        cdi_spec_dirs: Directories of CDI files; a later one takes precedence.
    """

    root: str = "/var/lib/vmruntime"
    run: str = "/run/vmruntime"
    socket: str = ""
    default_kind: Literal["container", "image", "host"] = "container"
    host_pods: Literal["required", "privileged", "never"] = "required"
    cgroup_driver: Literal["cgroupfs", "systemd"] = "cgroupfs"
    cgroup_parent: str = "/vmruntime"
    hooks_dirs: list[str] = []
    hooks_in_vms: Literal["refuse", "skip"] = "refuse"
    cdi_spec_dirs: list[str] = msgspec.field(default_factory=lambda: ["/etc/cdi", "/var/run/cdi"])
    hypervisor: HypervisorSettings = HypervisorSettings()
    guest: GuestSettings = GuestSettings()
    start: StartSettings = StartSettings()
    images: ImageSettings = ImageSettings()
    network: NetworkSettings = NetworkSettings()
    volumes: VolumeSettings = VolumeSettings()
    host: HostSettings = HostSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    streaming: StreamingSettings = StreamingSettings()
    log: LogSettings = LogSettings()

    @property
    def guest_directory(self) -> Path:
        """Where the guest's kernel and initramfs are."""
        return Path(self.guest.directory) if self.guest.directory else Path(self.root) / "guest"
