"""Places to run containers: VM backends."""
