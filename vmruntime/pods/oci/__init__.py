"""The OCI runtime configuration of a container, built from what CRI asked for and what the image says."""
