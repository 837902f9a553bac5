"""The endpoint that Prometheus scrapes; it runs in threads of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, start_http_server

from vmruntime.errors import Unavailable


class MetricsServer:
    """Serves /metrics until it is closed."""

    def __init__(self, address: str, port: int, registry: CollectorRegistry) -> None:
        """Begin to serve.

        Raises:
            Unavailable: The address cannot be listened on.
        """
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as error:
            raise Unavailable(
                f"metrics.address, metrics.port: {address}:{port} cannot be listened on: {error.strerror}"
            ) from error

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
