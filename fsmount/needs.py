"""Reads that wait for the agent.

A READ of absent bytes becomes one `Need`, told to the agent that is connected, and parked until the agent says that it is met,
that it failed, or until the deadline. While no agent is connected needs stay parked; the next one to connect is told all of
them. Nothing is queued here beyond what readers hold: their number is bounded by pyfuse3's tasks (`fsmount.takeover`).
"""

import errno
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

log = logging.getLogger("fsmount")


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes [offset, offset + length) of a volume are wanted within `deadline_s` from now."""

    volume: str
    offset: int
    length: int
    deadline_s: float


@dataclass(slots=True, eq=False)
class _Parked:
    number: int
    volume: str
    offset: int
    length: int
    since: float
    deadline: float
    done: trio.Event = field(default_factory=trio.Event)
    failure: tuple[int, str] | None = None


Tell = Callable[[int, Need], None]
"""Sends one numbered need to an agent; never blocks. An agent that cannot take it is disconnected by its connection."""


class Needs:
    """All parked reads of this process, and the agents that may meet them (the newest is asked)."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s: Final = deadline_s
        self._parked: dict[int, _Parked] = {}
        self._numbers = itertools.count(1)
        self._agents: list[Tell] = []
        self.asked_since = float("-inf")
        """When the agent that is asked now became the one (trio's clock): what an earlier one could not give, it may."""

    def __len__(self) -> int:
        return len(self._parked)

    @property
    def has_agent(self) -> bool:
        """Whether someone is there to meet needs."""
        return bool(self._agents)

    def attach(self, tell: Tell) -> None:
        """A new agent is here: it is told everything parked, and every need from now on."""
        self._agents.append(tell)
        self.asked_since = trio.current_time()
        self._tell_all()

    def detach(self, tell: Tell) -> None:
        """The agent is gone. If an older one is still connected it takes over again."""
        was_asked = bool(self._agents) and self._agents[-1] == tell
        if tell in self._agents:
            self._agents.remove(tell)
        if was_asked:
            self.asked_since = trio.current_time()
            self._tell_all()

    def answer(self, number: int, code: int, text: str) -> None:
        """The agent's answer: code 0 when the blocks are there, else an errno for the reader."""
        parked = self._parked.get(number)
        if parked is not None:
            if code:
                parked.failure = (code, text)
            parked.done.set()

    async def wait(
        self, volume: str, offset: int, length: int, since: float, patience_s: float | None = None, *, is_told: bool = False
    ) -> int:
        """Park until the range was said to be present; gives 0, or the errno with which the read must fail.

        `since` is when the read began (trio's clock): one deadline covers all the waits of a read. With `patience_s` the read
        can be asked again in smaller parts: it is given up sooner, with EAGAIN and without a word in the log. `is_told`: the
        log has it already that this read fails.
        """
        deadline = since + self.deadline_s
        parked = _Parked(next(self._numbers), volume, offset, length, since, deadline)
        self._parked[parked.number] = parked
        try:
            self._tell(parked)
            with trio.move_on_at(deadline if patience_s is None else min(deadline, since + patience_s)):
                await parked.done.wait()
        finally:
            del self._parked[parked.number]
        if parked.done.is_set() and parked.failure is None:
            return 0
        if patience_s is not None:
            return errno.EAGAIN
        if parked.failure is not None:
            code, reason = parked.failure
        else:
            code, reason = errno.EIO, "the agent did not answer in time" if self._agents else "no agent is connected"
        if not is_told:
            self._log(parked, trio.current_time() - since, code, reason)
        return code

    @staticmethod
    def _log(parked: _Parked, waited: float, code: int, reason: str) -> None:
        log.error(
            "read_failed volume=%s offset=%d length=%d waited_s=%.1f errno=%s reason=%s",
            parked.volume,
            parked.offset,
            parked.length,
            waited,
            errno.errorcode.get(code, code),
            reason,
        )

    def _tell_all(self) -> None:
        for parked in list(self._parked.values()):
            self._tell(parked)

    def _tell(self, parked: _Parked) -> None:
        if self._agents:
            remaining = max(0.0, parked.deadline - trio.current_time())
            self._agents[-1](parked.number, Need(parked.volume, parked.offset, parked.length, remaining))
