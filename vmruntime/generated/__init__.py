"""Protobuf stubs, generated from proto/ at build time."""
