"""SQLite: what the daemon knows and owns."""
