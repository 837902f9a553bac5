"""The <cpu> element of a domain."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from vmruntime.hypervisor.interface import Accelerator, FirmwareBoot, KernelBoot
from vmruntime.model.image_pod import CpuSetting
from vmruntime.model.resources import VmSize

# 5-level paging makes every page walk of an emulated CPU longer and helps no pod.
EMULATED_WITHOUT = "la57"


def cpu(boot: KernelBoot | FirmwareBoot, accelerator: Accelerator, size: VmSize) -> ET.Element:
    """Return the element for a machine."""
    if isinstance(boot, FirmwareBoot) and boot.cpu is not None:
        element = _as_set(boot.cpu, accelerator)
    elif accelerator is Accelerator.TCG:
        element = ET.Element("cpu", mode="maximum", check="none")
        ET.SubElement(element, "feature", policy="disable", name=EMULATED_WITHOUT)
    elif isinstance(boot, FirmwareBoot) and not boot.host_cpu:
        element = ET.Element("cpu", mode="maximum", check="none")
    else:
        element = ET.Element("cpu", mode="host-passthrough", check="none")
    if size.max_memory_mib > size.memory_mib:
        # libvirt lets memory grow only on machines with NUMA nodes.
        most = max(size.vcpus, size.max_vcpus)
        cell = {
            "id": "0",
            "cpus": f"0-{most - 1}",
            "memory": str(size.memory_mib),
            "unit": "MiB",
            "memAccess": "shared",
        }
        ET.SubElement(ET.SubElement(element, "numa"), "cell", cell)
    return element


def _as_set(setting: CpuSetting, accelerator: Accelerator) -> ET.Element:
    mode = setting.mode
    if accelerator is Accelerator.TCG and mode == "host-passthrough":
        mode = "maximum"  # all that the accelerator can do; the host's CPU itself cannot be passed to an emulated guest
    element = ET.Element(
        "cpu", _given(mode=mode, match=setting.match, check=setting.check, migratable=setting.migratable)
    )
    if accelerator is Accelerator.TCG and mode == "maximum":
        element.attrib.pop("migratable", None)
    if (model := setting.model) is not None:
        child = ET.SubElement(element, "model", _given(fallback=model.fallback, vendor_id=model.vendor_id))
        child.text = model.value or None
    if setting.vendor:
        ET.SubElement(element, "vendor").text = setting.vendor
    if (topology := setting.topology) is not None:
        numbers = {name: str(getattr(topology, name) or 1) for name in ("sockets", "dies", "cores", "threads")}
        ET.SubElement(element, "topology", numbers)
    if (cache := setting.cache) is not None:
        level = "" if cache.level is None else str(cache.level)
        ET.SubElement(element, "cache", _given(mode=cache.mode, level=level))
    for feature in setting.features:
        ET.SubElement(element, "feature", _given(name=feature.name, policy=feature.policy))
    return element


def _given(**attributes: str) -> dict[str, str]:
    return {name: value for name, value in attributes.items() if value}
