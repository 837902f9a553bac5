"""The libvirt driver: VMs that administrators see in virsh."""
