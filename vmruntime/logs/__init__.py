"""CRI log files."""
