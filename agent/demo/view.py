"""What the demo shows: a live table on a terminal, one line an event elsewhere, and the final table on both."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import attrs
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text


@attrs.define
class Row:
    """One node as it is known now; negative seconds are not known yet."""

    name: str
    state: str = "waiting"
    pull_s: float = -1.0
    first_output_s: float = -1.0
    first_bytes: int = -1
    registry: int = 0
    peers: int = 0
    cache: int = 0
    abandoned: int = 0
    chunks_verified: int = 0
    held: float = 0.0
    registry_log: int = 0
    output_ok: bool | None = None


class View(Protocol):
    """Where the story tells what happens."""

    def say(self, text: str) -> None:
        """One event, one line."""

    def show(self, rows: list[Row], image_size: int) -> None:
        """The state of all nodes has changed."""


class PlainView:
    """Lines with the time since the start, for logs and pipes."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """See `View`."""
        print(f"[{time.monotonic() - self._began:6.2f} s] {text}", flush=True)

    def show(self, rows: list[Row], image_size: int) -> None:
        """See `View`; lines say enough."""


class LiveView:
    """A table that is redrawn in place, below the events."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """See `View`."""
        self._live.console.print(f"[dim]{time.monotonic() - self._began:6.2f} s[/]  {text}")

    def show(self, rows: list[Row], image_size: int) -> None:
        """See `View`."""
        self._live.update(_table(rows, image_size))


@contextmanager
def open_view() -> Iterator[View]:
    """The live view if stdout is a terminal, lines otherwise."""
    console = Console()
    if not console.is_terminal:
        yield PlainView()
        return
    with Live(Text(""), console=console, refresh_per_second=8, transient=True) as live:
        yield LiveView(live)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}" if count else "0"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0 else ""


def _table(rows: list[Row], image_size: int) -> Group:
    table = Table(title=f"sample image: {image_size / 1e6:.0f} MB compressed; columns of bytes in MB", title_justify="left")
    for heading in ("node", "state"):
        table.add_column(heading)
    for heading in (
        "pull s",
        "first\noutput s",
        "MB until\noutput",
        "from\nregistry",
        "from\npeers",
        "own\ncache",
        "registry's\nlog",
        "chunks\nverified",
    ):
        table.add_column(heading, justify="right")
    table.add_column("held")
    for row in rows:
        filled = round(row.held * 10)
        table.add_row(
            row.name,
            Text(row.state, style={True: "green", False: "red", None: ""}[row.output_ok]),
            _seconds(row.pull_s),
            _seconds(row.first_output_s),
            _megabytes(row.first_bytes) if row.first_bytes >= 0 else "",
            _megabytes(row.registry),
            _megabytes(row.peers),
            _megabytes(row.cache),
            _megabytes(row.registry_log),
            str(row.chunks_verified),
            Text("█" * filled + "·" * (10 - filled), style="cyan"),
        )
    return Group(table)


def print_final(rows: list[Row], image_size: int) -> None:
    """The table at the end; bytes are megabytes of compressed blobs."""
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log or a pipe has no width; the table needs this much
    console.print(_table(rows, image_size))
