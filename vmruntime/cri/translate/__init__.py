"""CRI messages to model and back."""
