"""Volumes of pods in VMs: what kubelet has on the host, made visible in the guest."""
