"""A daemon without VMs: the whole of it but for the hypervisor and the network, for tests and benchmarks.

Run as `python -m tests.support.fake_daemon CONFIG`, in place of `python -m vmruntime.daemon CONFIG`. Its pods end with it.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.support.fakes import FakeNetwork
from vmruntime.agent.fake_guest import FakeGuest
from vmruntime.agent.fake_server import BootingGuest
from vmruntime.aio.faults import Faults
from vmruntime.config.loader import load
from vmruntime.daemon.main import serve
from vmruntime.daemon.parts import Parts
from vmruntime.hypervisor.fake import FakeHypervisor
from vmruntime.sandboxes.cgroup import HostCgroups


def fake_parts(faults: Faults | None = None) -> Parts:
    """Return a hypervisor whose guests come up at once, a network in memory, and no cgroups."""
    faults = faults or Faults()
    hypervisor = FakeHypervisor(lambda spec: BootingGuest(FakeGuest(faults)), faults)
    return Parts(hypervisor=hypervisor, network=FakeNetwork(faults), cgroups=HostCgroups([]))


if __name__ == "__main__":
    asyncio.run(serve(load(Path(sys.argv[1])), fake_parts()))
