"""cloud-init seeds: what a guest is told about itself at its first boot, and the ISO image it is told by."""
