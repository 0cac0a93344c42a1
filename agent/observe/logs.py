"""Logging of the agent: structlog's own lines and those of libraries in one stream and form, on stderr."""

import logging
import sys
from typing import Final

import structlog

NOISY: Final = ("libp2p", "multiaddr", "zeroconf", "hypercorn", "httpx", "httpcore", "asyncio")
"""Libraries whose INFO is not an operator's business."""


def set_up_logging(level: str, form: str) -> None:
    """`level` as in the settings; `form` console, json or auto (console when stderr is a terminal)."""
    is_console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if is_console else structlog.processors.JSONRenderer()
    )
    number = getattr(logging, level.upper())
    last: list[structlog.typing.Processor] = [renderer] if is_console else [structlog.processors.format_exc_info, renderer]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for name in NOISY:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
