"""The daemon's own messages: structured events on stderr."""

from __future__ import annotations

import logging
import sys

import structlog

from vmruntime.config.settings import LogSettings


def configure(settings: LogSettings) -> None:
    """Send log events to stderr as text or JSON, from the chosen level on."""
    renderer = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries speak through the standard module; qemu.qmp reports every
    # disconnect as an error of its own, and one while QEMU dies as a defect of its own.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)
