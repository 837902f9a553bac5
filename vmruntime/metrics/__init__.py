"""The daemon's own metrics, for Prometheus."""
