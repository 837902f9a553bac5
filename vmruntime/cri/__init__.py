"""The CRI gRPC services."""
