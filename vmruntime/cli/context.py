"""What every command is given: the global options, the settings and the daemon they lead to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import msgspec

from vmruntime.cli.client import Client
from vmruntime.config.loader import load
from vmruntime.config.settings import Settings
from vmruntime.paths import Paths


@dataclasses.dataclass
class App:
    """The global options of one invocation.

    Attributes:
        config: --config, None for the default file.
        address: --address as given, empty for the settings' socket.
        debug: Whether a failure shows its traceback.
    """

    config: Path | None = None
    address: str = ""
    debug: bool = False
    _settings: Settings | None = None

    @property
    def settings(self) -> Settings:
        """The configuration, read once; --address takes the place of its socket."""
        if self._settings is None:
            settings = load(self.config)
            if self.address:
                settings = msgspec.structs.replace(settings, socket=str(self.socket_of(settings)))
            self._settings = settings
        return self._settings

    @property
    def paths(self) -> Paths:
        """The directory layout that the settings give."""
        return Paths(root=Path(self.settings.root), run=Path(self.settings.run))

    @property
    def logs(self) -> Path:
        """Where the logs of pods go that `vmruntime run` makes."""
        return Path(self.settings.root) / "logs"

    @property
    def socket(self) -> Path:
        """The CRI socket to talk to."""
        return self.socket_of(self.settings)

    def socket_of(self, settings: Settings) -> Path:
        """Return the socket that --address, else the settings name."""
        given = self.address.removeprefix("unix://") or settings.socket
        return Path(given).absolute() if given else Paths(run=Path(settings.run)).socket

    def connect(self) -> Client:
        """Return a client of the daemon, closed when the command ends.

        Raises:
            Unavailable: No daemon answers.
        """
        client = Client.connect(self.socket)
        click.get_current_context().call_on_close(client.close)
        return client


pass_app = click.make_pass_decorator(App)
