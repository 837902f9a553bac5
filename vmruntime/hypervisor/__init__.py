"""Virtual machines: the interface and its drivers."""
