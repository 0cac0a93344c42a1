"""The agent's end of the link to fsmount.

fsmount listens on run_dir/fsmount.sock; frames are those of `fsmount.framing`. What crosses the link:

- First, client: `{op: "hello", version: 1, role: "agent" | "tool"}`; the answer has `version`, `pid`, `holder_pid`,
  `presentations`. It comes once the machine was probed.
- Calls, client: `{id, op, ...}`; each is answered, in any order, by `{id, result}` or by `{id, error, errno, kind}`, where `kind`
  is "mount" for what the kernel refused and "link" for a bad call. Operations and their fields are those of `Link`'s methods.
- Needs, fsmount to the newest connection of role "agent": `{need, volume, offset, length, deadline_s}`; the answer is
  `{met: need, errno, error}`, errno 0 when every block of the range is marked present.

A connection that breaks these rules is closed. When fsmount is upgraded or dies the connection ends; the socket stays, held by
the holder, so a new connection waits for the successor instead of failing.
"""

import errno
import itertools
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from fsmount.control import connect, start_fsmount, stop_fsmount, upgrade_fsmount
from fsmount.errors import LinkError, MountError, ShoalError
from fsmount.framing import PROTOCOL_VERSION, Message, Unpacker, number, pack, text, texts
from fsmount.needs import Need

__all__ = [
    "FsmountInfo",
    "Link",
    "MountedLayer",
    "Need",
    "open_link",
    "start_fsmount",
    "stop_fsmount",
    "upgrade_fsmount",
]

log = logging.getLogger("fsmount.link")


@dataclass(frozen=True, slots=True)
class FsmountInfo:
    """Who answers at the other end, and which presentations work on this machine, best first."""

    version: str
    pid: int
    holder_pid: int
    presentations: list[str]


@dataclass(frozen=True, slots=True)
class MountedLayer:
    """Where a layer is presented, and how."""

    path: Path
    presentation: str


OnNeed = Callable[[Need], Awaitable[None]]


class Link:
    """A connection to fsmount. Every call raises LinkError once it is closed; calls may run at the same time."""

    def __init__(self, stream: trio.SocketStream, info: FsmountInfo) -> None:
        self.info: Final = info
        self._stream = stream
        self._numbers = itertools.count(1)
        self._answers: dict[int, trio.MemorySendChannel[Message]] = {}
        self._sending = trio.Lock()
        self._closed = trio.Event()

    async def add_volume(self, name: str, data_path: Path, blocks_path: Path, size: int) -> None:
        """Register a volume: a sparse file and the map of its present 4 KiB blocks. Again with the same facts: no change.

        Raises:
            MountError: the files do not fit, or the name has other files.
        """
        await self._call("add_volume", name=name, data_path=str(data_path), blocks_path=str(blocks_path), size=size)

    async def remove_volume(self, name: str) -> None:
        """Forget a volume. Who has it open reads on. Raises MountError if a layer uses it."""
        await self._call("remove_volume", name=name)

    async def mount_layer(self, name: str, image_path: Path, volumes: list[str], presentation: str = "auto") -> MountedLayer:
        """Present a layer: its EROFS metadata image over registered volumes, in the order of the image's devices.

        Raises:
            MountError: the kernel refuses every presentation allowed.
        """
        result = await self._call(
            "mount_layer", name=name, image_path=str(image_path), volumes=volumes, presentation=presentation
        )
        if not isinstance(result, dict):
            raise LinkError("fsmount answered mount_layer with something else")
        return MountedLayer(Path(text(result, "path")), text(result, "presentation"))

    async def unmount_layer(self, name: str) -> None:
        """Take a layer's mount away, lazily. Not mounted: no change."""
        await self._call("unmount_layer", name=name)

    async def mount_root(self, target: Path, layers: Sequence[str]) -> None:
        """Mount layers merged, read-only, at an existing directory; bottom first. Raises MountError."""
        await self._call("mount_root", target=str(target), layers=list(layers))

    async def unmount_root(self, target: Path) -> None:
        """Take a merged root away, lazily. Not mounted: no change."""
        await self._call("unmount_root", target=str(target))

    async def list(self) -> dict[str, list[dict[str, Any]]]:
        """All volumes, layers and roots, as lists of maps."""
        result = await self._call("list")
        if not isinstance(result, dict):
            raise LinkError("fsmount answered list with something else")
        return result

    async def status(self) -> dict[str, Any]:
        """Counters of the process: `parked_reads`, `has_agent`."""
        result = await self._call("status")
        if not isinstance(result, dict):
            raise LinkError("fsmount answered status with something else")
        return result

    async def wait_closed(self) -> None:
        """Returns when the connection has ended: fsmount was upgraded or died. Connect again and say everything again."""
        await self._closed.wait()

    async def _call(self, operation: str, **fields: Any) -> Any:
        if self._closed.is_set():
            raise LinkError("the connection to fsmount is closed")
        call = next(self._numbers)
        send, receive = trio.open_memory_channel[Message](1)
        self._answers[call] = send
        try:
            await self._send({"id": call, "op": operation, **fields})
            message = await receive.receive()
        except trio.EndOfChannel:
            raise LinkError(f"fsmount went away during {operation}") from None
        finally:
            self._answers.pop(call, None)
        if "error" not in message:
            return message.get("result")
        if message.get("kind") == "mount":
            raise MountError(text(message, "error"), number(message, "errno"))
        raise LinkError(text(message, "error"))

    async def _send(self, message: Message) -> None:
        frame = pack(message)
        try:
            async with self._sending:
                with trio.CancelScope(shield=True):  # half a frame would break the link for everybody
                    await self._stream.send_all(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkError("the connection to fsmount is closed") from error

    async def _receive(self, unpacker: Unpacker, early: Sequence[Message], on_need: OnNeed | None) -> None:
        try:
            async with trio.open_nursery() as needs:
                messages = list(early)
                while True:
                    for message in messages:
                        if "need" in message and on_need is not None:
                            needs.start_soon(self._meet, message, on_need)
                        elif "id" in message:
                            waiting = self._answers.pop(number(message, "id"), None)
                            if waiting is not None:
                                waiting.send_nowait(message)
                    data = await self._stream.receive_some(65536)
                    if not data:
                        break
                    messages = unpacker.feed(data)
                needs.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, LinkError) as group:
            log.warning("link_broken reason=%s", group.exceptions[0])
        finally:
            self._closed.set()
            for waiting in self._answers.values():
                waiting.close()

    async def _meet(self, message: Message, on_need: OnNeed) -> None:
        """The edge to the agent's resolver: whatever it raises becomes the reader's errno."""
        need = number(message, "need")
        seconds = message.get("deadline_s")
        if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
            raise LinkError("a need has no deadline")
        code, reason = errno.EIO, "the agent's deadline passed"
        with trio.move_on_after(seconds):
            try:
                await on_need(Need(text(message, "volume"), number(message, "offset"), number(message, "length"), seconds))
                code, reason = 0, ""
            except OSError as error:
                code, reason = error.errno or errno.EIO, str(error)
            except ShoalError as error:
                reason = str(error)
            except Exception as error:
                log.exception("need_failed")
                reason = f"{type(error).__name__} in the agent"
        try:
            await self._send({"met": need, "errno": code, "error": reason[:1000]})
        except LinkError:
            log.debug("need_answered_too_late need=%d", need)


@asynccontextmanager
async def open_link(run_dir: Path, on_need: OnNeed | None = None) -> AsyncIterator[Link]:
    """Connect to the fsmount of `run_dir`. With `on_need` this connection is the one that meets its needs.

    `on_need` runs in a task of its own for each need. When it returns, every block of the range is set in the volume's map;
    when it raises OSError the reader gets that errno, for any other error EIO.

    Raises:
        LinkError: no fsmount runs there, or it speaks another version.
    """
    path = run_dir / "fsmount.sock"
    try:
        stream = await connect(path)
    except OSError as error:
        raise LinkError(f"no fsmount answers at {path}: {error.strerror or error}") from error
    unpacker = Unpacker()
    async with stream:
        try:
            hello = {"op": "hello", "version": PROTOCOL_VERSION, "role": "tool" if on_need is None else "agent"}
            await stream.send_all(pack(hello))
            messages: list[Message] = []
            while not messages:
                data = await stream.receive_some(65536)
                if not data:
                    raise LinkError(f"fsmount at {path} closed the connection")
                messages = unpacker.feed(data)
        except trio.BrokenResourceError as error:
            raise LinkError(f"fsmount at {path} closed the connection") from error
        first = messages[0]
        if "error" in first:
            raise LinkError(f"fsmount at {path} refuses: {text(first, 'error')}")
        info = FsmountInfo(
            text(first, "version"), number(first, "pid"), number(first, "holder_pid"), texts(first, "presentations")
        )
        link = Link(stream, info)
        raised: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link._receive, unpacker, messages[1:], on_need)
            try:
                yield link
            except Exception as error:  # noqa: BLE001  carried out of the nursery, which would wrap it in a group
                raised = error
            nursery.cancel_scope.cancel()
        if raised is not None:
            raise raised
