"""The vmruntime command."""
