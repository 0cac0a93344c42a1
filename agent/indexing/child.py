"""The program that index processes run: it imports what reading an index takes, and forks a worker for each index.

Standard input is a socket to the agent, over which come the place of a format (`agent.formats.catalogue`) and the worker's end of a
socket. The worker says which process it is (a pidfd), reads one index and ends. This process ends when the agent closes its socket
or goes away; a worker when it has nobody to talk to, or when the agent kills it.
"""

import gc
import os
import resource
import signal
import socket
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from agent.formats import catalogue, estargz  # noqa: F401 - what most layers need
from agent.formats.model import FormatError, NoIndex
from agent.formats.opening import Format
from agent.indexing import messages
from fsmount.erofs import write_image

MAX_MEMORY: Final = 4 << 30
"""A layer of a million entries takes 3 GB while its index is read; more is refused here instead of taken from the node."""
MAX_PLACE: Final = 200


def main() -> None:
    """Serve until the socket ends."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY if hard == resource.RLIM_INFINITY else min(MAX_MEMORY, hard), hard))
    with suppress(OSError):  # if memory runs out on the node, this process goes first: the layer is then read through instead
        Path("/proc/self/oom_score_adj").write_text("800")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    with socket.socket(fileno=0) as control, suppress(ConnectionError):
        while True:
            place, fds, _, _ = socket.recv_fds(control, MAX_PLACE, 1)
            if not place:
                return
            with socket.socket(fileno=fds[0]) as sock:
                found = catalogue.format_at(place.decode())  # imported here, it need not be in each worker
                if not os.fork():
                    control.close()
                    _work(sock, found)


def _work(sock: socket.socket, layer_format: Format) -> None:
    """A worker's life; does not return."""
    gc.disable()  # it would look at a growing tree again and again: a tenth of the time; all of it is gone in a moment
    try:
        with suppress(EOFError, ConnectionError):
            socket.send_fds(sock, [b"p"], [os.pidfd_open(os.getpid())])
            head, _ = _receive(sock)
            _read(sock, layer_format, head)
    finally:
        os._exit(0)


def _read(sock: socket.socket, layer_format: Format, request: dict[str, Any]) -> None:
    """One index, from the first want to the result."""
    try:
        facts = messages.facts_of(request["facts"])
        reader = layer_format.read_index(facts)
        try:
            want = next(reader)
            while True:
                _send(sock, messages.want_head(want))
                want = reader.send(bytes(_receive(sock)[1]))
        except StopIteration as stop:
            index = stop.value
        meta = write_image(index.root, volume_size=index.volume_size, user_markers=False)
        head, parts = messages.index_frame(index, meta)
    except NoIndex as exc:
        _send(sock, {"no_index": str(exc)})
    except FormatError as exc:
        _send(sock, {"format_error": str(exc)})
    except MemoryError:
        _send(sock, {"format_error": f"reading the index takes more than {MAX_MEMORY >> 30} GiB of memory"})
    except (EOFError, ConnectionError):
        raise
    except Exception:  # noqa: BLE001 - the process's edge: the agent logs it and goes on
        _send(sock, {"defect": traceback.format_exc(limit=-4)})
    else:
        _send(sock, {"index": head}, parts)


def _send(sock: socket.socket, head: dict[str, Any], parts: list[bytes | bytearray] | tuple[()] = ()) -> None:
    sock.sendall(messages.pack_head(head, sum(len(part) for part in parts)))
    for part in parts:
        sock.sendall(part)


def _receive(sock: socket.socket) -> tuple[dict[str, Any], bytearray]:
    head_size, body_size = messages.lengths(bytes(_exactly(sock, messages.HEAD.size)))
    head = messages.unpack_head(bytes(_exactly(sock, head_size)))
    return head, _exactly(sock, body_size)


def _exactly(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = sock.recv_into(view[at:])
        if not count:
            raise EOFError
        at += count
    return data


if __name__ == "__main__":
    main()
