"""vmruntime: a Kubernetes CRI runtime that runs each pod as its own virtual machine."""

__version__ = "0.1.0"
