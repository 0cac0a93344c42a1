"""fsmount's end of the link; the protocol is told in `fsmount.link`.

Any number of connections; of those with the role "agent" the newest is told the needs. Each connection has a bounded outbox: an
agent that does not take its messages for so long is disconnected, and its needs go to whoever connects next.
"""

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from fsmount import __version__
from fsmount.errors import LinkError, MountError, ShoalError
from fsmount.framing import PROTOCOL_VERSION, Message, Unpacker, number, pack, text, texts
from fsmount.mounts import Mounts
from fsmount.needs import Need, Needs

log = logging.getLogger("fsmount")

_OUTBOX: Final = 16384
"""Messages: more than all parked reads of a process together (`fsmount.takeover`)."""

_CALLS_AT_ONCE: Final = 64
_HELLO_S: Final = 10


class LinkServer:
    """Serves connections until cancelled."""

    def __init__(self, mounts: Mounts, needs: Needs, holder_pid: Callable[[], int]) -> None:
        self._mounts = mounts
        self._needs = needs
        self._holder_pid = holder_pid
        self.probed: Final = trio.Event()
        self._operations: dict[str, Callable[[Message], Awaitable[Any]]] = {
            "add_volume": self._add_volume,
            "remove_volume": lambda m: mounts.remove_volume(text(m, "name")),
            "mount_layer": self._mount_layer,
            "unmount_layer": lambda m: mounts.unmount_layer(text(m, "name")),
            "mount_root": lambda m: mounts.mount_root(text(m, "target"), texts(m, "layers")),
            "unmount_root": lambda m: mounts.unmount_root(text(m, "target")),
            "list": self._list,
            "status": self._status,
        }

    async def serve(self, listener: trio.SocketListener) -> None:
        """Accept and serve connections."""
        await trio.serve_listeners(self._serve_one, [listener])

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        send, receive = trio.open_memory_channel[Message](_OUTBOX)
        try:
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._write, stream, receive)
                try:
                    await self._read(stream, send, nursery.cancel_scope)
                finally:
                    nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, LinkError) as group:
            log.info("connection_ended reason=%s", group.exceptions[0])

    @staticmethod
    async def _write(stream: trio.SocketStream, outbox: trio.MemoryReceiveChannel[Message]) -> None:
        async for message in outbox:
            await stream.send_all(pack(message))

    async def _read(self, stream: trio.SocketStream, outbox: trio.MemorySendChannel[Message], scope: trio.CancelScope) -> None:
        unpacker = Unpacker()
        messages: list[Message] = []
        with trio.fail_after(_HELLO_S):
            while not messages:
                data = await stream.receive_some(65536)
                if not data:
                    return
                messages = unpacker.feed(data)
        hello = messages.pop(0)
        if hello.get("op") != "hello" or hello.get("version") != PROTOCOL_VERSION:
            await outbox.send({"error": f"this fsmount speaks version {PROTOCOL_VERSION} of the link"})
            with trio.move_on_after(1):
                await stream.wait_send_all_might_not_block()
            return
        await self.probed.wait()
        facts = {"version": __version__, "pid": os.getpid(), "holder_pid": self._holder_pid()}
        await outbox.send({**facts, "presentations": self._mounts.presentations})

        def tell(numbered: int, need: Need) -> None:
            message = {
                "need": numbered,
                "volume": need.volume,
                "offset": need.offset,
                "length": need.length,
                "deadline_s": need.deadline_s,
            }
            try:
                outbox.send_nowait(message)
            except trio.WouldBlock:
                log.error("agent_disconnected reason=it does not take its messages")
                scope.cancel()
            except trio.ClosedResourceError:
                return

        is_agent = hello.get("role") == "agent"
        if is_agent:
            self._needs.attach(tell)
        limit = trio.Semaphore(_CALLS_AT_ONCE)
        try:
            async with trio.open_nursery() as calls:
                while True:
                    for message in messages:
                        if "met" in message:
                            self._needs.answer(number(message, "met"), number(message, "errno"), text(message, "error"))
                        else:
                            await limit.acquire()
                            calls.start_soon(self._answer, message, outbox, limit)
                    data = await stream.receive_some(65536)
                    if not data:
                        break
                    messages = unpacker.feed(data)
                self._needs.detach(tell)
                # A call that was under way when its caller vanished is finished: the table must not stop half-way.
        finally:
            if is_agent:
                self._needs.detach(tell)

    async def _answer(self, message: Message, outbox: trio.MemorySendChannel[Message], limit: trio.Semaphore) -> None:
        """The edge of the component: every call is answered."""
        call = message.get("id")
        try:
            operation = self._operations.get(text(message, "op"))
            if operation is None:
                raise LinkError(f"there is no operation {message['op']!r}")
            with trio.CancelScope(shield=True):
                result = await operation(message)
            answer: Message = {"id": call, "result": result}
        except MountError as error:
            answer = {"id": call, "error": str(error), "errno": error.errno, "kind": "mount"}
        except LinkError as error:
            answer = {"id": call, "error": str(error), "errno": errno.EINVAL, "kind": "link"}
        except (OSError, ShoalError) as error:
            answer = {"id": call, "error": str(error), "errno": getattr(error, "errno", None) or errno.EIO, "kind": "mount"}
        except Exception as error:
            log.exception("call_failed op=%s", message.get("op"))
            answer = {"id": call, "error": f"{type(error).__name__}: {error}", "errno": errno.EIO, "kind": "mount"}
        finally:
            limit.release()
        try:
            await outbox.send(answer)
        except trio.ClosedResourceError:
            return

    async def _add_volume(self, message: Message) -> None:
        await self._mounts.add_volume(
            text(message, "name"), text(message, "data_path"), text(message, "blocks_path"), number(message, "size")
        )

    async def _mount_layer(self, message: Message) -> dict[str, str]:
        path, presentation = await self._mounts.mount_layer(
            text(message, "name"), text(message, "image_path"), texts(message, "volumes"), text(message, "presentation")
        )
        return {"path": path, "presentation": presentation}

    async def _list(self, _message: Message) -> dict[str, list[dict[str, Any]]]:
        return self._mounts.list()

    async def _status(self, _message: Message) -> dict[str, Any]:
        return {"parked_reads": len(self._needs), "has_agent": self._needs.has_agent}
