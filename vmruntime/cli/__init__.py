"""The vmruntime command: what a person types, and what is shown to them.

The commands speak CRI over the daemon's socket, as kubelet and crictl do; only `serve` runs the daemon itself.
"""
