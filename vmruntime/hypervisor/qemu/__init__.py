"""The QEMU driver: argv and QMP."""
