"""Keeps the agent connected to fsmount: starts it where none runs, reconnects after its death or upgrade."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog
import trio

from agent.errors import LinkError
from fsmount.link import FsmountInfo, Link, Need, open_link, start_fsmount

log = structlog.get_logger()

RETRY_S: Final = 0.2
RETRY_MOST_S: Final = 5.0


class FsmountLink:
    """Gives the connection of the moment; made by `open_fsmount_link`."""

    def __init__(self) -> None:
        self._link: Link | None = None
        self._changed = trio.Event()
        self.info: FsmountInfo | None = None
        self.problem = ""

    async def current(self) -> Link:
        """The connection, as soon as there is one."""
        while self._link is None:
            await self._changed.wait()
        return self._link

    def _set(self, link: Link | None) -> None:
        self._link = link
        if link is not None:
            self.info = link.info
        self._changed.set()
        self._changed = trio.Event()

    async def keep(
        self,
        start: Callable[[], Awaitable[None]],
        run_dir: Path,
        on_need: Callable[[Need], Awaitable[None]],
        on_connected: Callable[[Link], Awaitable[None]],
    ) -> None:
        """Connect, and connect again whenever the connection ends."""
        delay = RETRY_S
        while True:
            try:
                await start()
                async with open_link(run_dir, on_need) as link:
                    await on_connected(link)
                    log.info(
                        "fsmount_connected",
                        pid=link.info.pid,
                        holder_pid=link.info.holder_pid,
                        presentations=link.info.presentations,
                    )
                    self.problem, delay = "", RETRY_S
                    self._set(link)
                    try:
                        await link.wait_closed()
                    finally:
                        self._set(None)
                log.warning("fsmount_away", reason="the connection ended; its holder starts it again")
            except LinkError as exc:
                if str(exc) != self.problem:
                    log.warning("fsmount_unreachable", reason=str(exc))
                self.problem = str(exc)
                await trio.sleep(delay)
                delay = min(RETRY_MOST_S, delay * 2)


@asynccontextmanager
async def open_fsmount_link(
    run_dir: Path,
    on_need: Callable[[Need], Awaitable[None]],
    on_connected: Callable[[Link], Awaitable[None]],
    *,
    read_deadline_s: float,
    presentation: str,
) -> AsyncIterator[FsmountLink]:
    """Keep a link until the block ends; fsmount itself goes on. `on_connected` runs before anybody else gets a new connection."""

    async def start() -> None:
        await start_fsmount(run_dir, read_deadline_s=read_deadline_s, presentation=presentation)

    keeper = FsmountLink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.keep, start, run_dir, on_need, on_connected)
        yield keeper
        nursery.cancel_scope.cancel()
