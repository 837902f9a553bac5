"""What every driver does by QMP: the part of a running VM that does not depend on who started QEMU."""
