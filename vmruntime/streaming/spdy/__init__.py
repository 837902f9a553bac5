"""SPDY/3.1 as Kubernetes streams use it, without I/O."""
