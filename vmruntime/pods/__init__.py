"""Use cases on pods and containers, one a file."""
