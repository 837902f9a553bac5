"""Pure data: what a sandbox, a container and an image are."""
