"""WebSocket channels as Kubernetes streams use them, without I/O."""
