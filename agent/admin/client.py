"""The client's end: plain blocking calls, so that a command starts fast and needs no event loop."""

import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgpack

from agent.errors import LinkError, ShoalError

MAX_FRAME: Final = 4 << 20


def call(
    run_dir: Path, name: str, args: Mapping[str, object] | None = None, on_event: Callable[[dict[str, Any]], None] | None = None
) -> Any:
    """Call a running agent and wait for its answer.

    Raises:
        LinkError: no agent runs with this run directory, or it went away.
        ShoalError: the agent said no; the text is its own.
    """
    path = run_dir / "agent.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except OSError as exc:
            raise LinkError(
                f"no agent answers at {path} ({exc.strerror}); start one with `shoal agent --run-dir {run_dir}`"
            ) from exc
        body = msgpack.packb({"call": name, "args": dict(args or {})})
        sock.sendall(struct.pack("<I", len(body)) + body)
        while True:
            frame = _read_frame(sock)
            if "event" in frame:
                if on_event is not None:
                    on_event(frame["event"])
            elif "error" in frame:
                raise ShoalError(str(frame["error"]))
            else:
                return frame.get("result")


def _read_frame(sock: socket.socket) -> dict[str, Any]:
    (length,) = struct.unpack("<I", _read_exactly(sock, 4))
    if length > MAX_FRAME:
        raise LinkError(f"the agent sent a frame of {length} bytes")
    frame = msgpack.unpackb(_read_exactly(sock, length))
    if not isinstance(frame, dict):
        raise LinkError("the agent sent something that is no answer")
    return frame


def _read_exactly(sock: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        block = sock.recv(min(65536, length - len(parts)))
        if not block:
            raise LinkError("the agent went away before it had answered; its log says why")
        parts += block
    return bytes(parts)
