"""A Kubernetes CRI runtime that runs each pod as its own virtual machine."""

import os

__version__ = "0.1.0"

# libvirt's driver inside the daemon forks, and gRPC's handlers of forks would abort the child before it becomes QEMU. gRPC
# looks at this once, when it is loaded, which every way into this package comes before.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
