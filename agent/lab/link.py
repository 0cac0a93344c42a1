"""A slow link in user space: a TCP proxy with latency, a shared rate and a count of bytes per client.

Kernels of test machines often lack netem, so latency is made here. Each node sees the far end at a loopback address inside its own
network namespace; the process opens its listening sockets there and its outgoing ones in the namespace it was started in. Towards
the far end every node has a source address of its own (127.0.1.N), so the far end's own log tells the nodes apart.

What is modelled: each direction has `rate` bytes a second for all connections together, then `delay` seconds; a new connection
costs one round trip before its first byte leaves, as a handshake would. Not modelled: slow start and loss.

How: both directions keep the time at which the link is free again. A block read now leaves at `max(now, free) + size / rate` and
arrives `delay` later; so arrival times only grow, and one queue per direction, in order, holds all blocks under way. A connection
is not read while the link's backlog is over `BACKLOG_S` or while its own bytes under way exceed `WINDOW`.

Run as `python -m agent.lab.link --control PATH --target HOST:PORT --listen NAME=NETNS,HOST:PORT,SOURCE …`. It prints `ready`. One
line written to the control socket is a command: `stats` answers with JSON; `down` drops every connection and refuses new ones;
`up` ends that.
"""

import argparse
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque

READ = 128 << 10
"""Bytes a read: 400 reads a second at 50 MB/s, and 2.6 ms of the link at that rate."""
BACKLOG_S = 0.008
"""How far ahead the link may be booked; as a router's queue, it delays whoever comes next."""
WINDOW = 4 << 20
"""Bytes of one connection under way or undelivered before it is not read; above the 1 MB that 50 MB/s x 20 ms need."""
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1


class Pacer:
    """When a block that is read now arrives at the other end."""

    __slots__ = ("_delay", "_free", "_rate")

    def __init__(self, rate: float, delay: float) -> None:
        self._rate = rate
        self._delay = delay
        self._free = 0.0

    def book(self, now: float, size: int) -> float:
        """Take `size` bytes of the link's time; gives the moment of arrival. Never earlier than what was booked before."""
        self._free = max(now, self._free)
        if self._rate:
            self._free += size / self._rate
        return self._free + self._delay

    def backlog(self, now: float) -> float:
        """Seconds for which the link is booked."""
        return self._free - now


class _Flow:
    """One direction of one connection: from `source` to `sink`."""

    __slots__ = ("at", "connection", "ended", "is_down", "lane", "pending", "reading", "sink", "source", "under_way")

    def __init__(
        self, connection: "_Connection", source: socket.socket, sink: socket.socket, lane: "_Lane", *, is_down: bool
    ) -> None:
        self.connection = connection
        self.source = source
        self.sink = sink
        self.lane = lane
        self.is_down = is_down
        self.pending: deque[bytes] = deque()  # arrived, not yet taken by the sink
        self.at = 0  # bytes of pending[0] already taken
        self.under_way = 0
        self.reading = False
        self.ended = False  # the sink was told that no more comes


class _Connection:
    __slots__ = ("client", "closed", "down", "name", "server", "up")

    def __init__(self, name: str, client: socket.socket, server: socket.socket, up: "_Lane", down: "_Lane") -> None:
        self.name = name
        self.client = client
        self.server = server
        self.up = _Flow(self, client, server, up, is_down=False)
        self.down = _Flow(self, server, client, down, is_down=True)
        self.closed = False


class _Lane:
    """One direction of the link: its pacer, the blocks under way, and the flows that wait for its backlog to shrink."""

    def __init__(self, rate: float, delay: float) -> None:
        self.pacer = Pacer(rate, delay)
        self.queue: deque[tuple[float, _Flow, bytes]] = deque()  # b"" is the end of the flow
        self.waiting: deque[_Flow] = deque()


class Link:
    """The event loop; see the module's text."""

    def __init__(self, target: tuple[str, int], rate: float, round_trip: float) -> None:
        self._target = target
        self._round_trip = round_trip
        self._epoll = select.epoll()
        self._up = _Lane(rate, round_trip / 2)
        self._down = _Lane(rate, round_trip / 2)
        self._listeners: dict[int, tuple[socket.socket, str, str]] = {}
        self._flows: dict[int, tuple[_Flow, _Flow]] = {}  # file descriptor: the flow read from it, the flow written to it
        self._fresh: deque[tuple[float, _Connection]] = deque()  # in the handshake
        self._control: socket.socket | None = None
        self._is_down = False
        self._stop = False
        self.stats: dict[str, dict[str, int]] = {}

    def listen(self, name: str, listener: socket.socket, source: str) -> None:
        """Accept the connections of node `name`; they go out from address `source`."""
        listener.setblocking(False)
        self._listeners[listener.fileno()] = (listener, name, source)
        self.stats[name] = {"down": 0, "up": 0, "connections": 0}
        self._epoll.register(listener, select.EPOLLIN)

    def control(self, path: str) -> None:
        """Take commands on a unix socket."""
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control.bind(path)
        self._control.listen(8)
        self._control.setblocking(False)
        self._epoll.register(self._control, select.EPOLLIN)

    def stop(self, *_signal: object) -> None:
        """End `run` at the next event."""
        self._stop = True

    def run(self) -> None:
        """Serve until stopped."""
        while not self._stop:
            try:
                events = self._epoll.poll(self._next_timer())
            except InterruptedError:
                continue
            for fd, event in events:
                self._handle(fd, event)
            self._timers(time.monotonic())

    # -- timers -------------------------------------------------------------------------------------------------------------------

    def _next_timer(self) -> float:
        soonest = [0.5]  # a stop by signal is noticed at the latest then
        now = time.monotonic()
        for lane in (self._up, self._down):
            if lane.queue:
                soonest.append(lane.queue[0][0] - now)
            if lane.waiting:
                soonest.append(lane.pacer.backlog(now) - BACKLOG_S)
        if self._fresh:
            soonest.append(self._fresh[0][0] - now)
        return max(0.0, min(soonest))

    def _timers(self, now: float) -> None:
        # epoll waits in whole milliseconds, rounded up; taking what is due within half of one keeps the mean delay true.
        due = now + 0.0005
        while self._fresh and self._fresh[0][0] <= due:
            connection = self._fresh.popleft()[1]
            if not connection.closed:
                self._resume(connection.up)
                self._resume(connection.down)
        for lane in (self._up, self._down):
            while lane.queue and lane.queue[0][0] <= due:
                _at, flow, data = lane.queue.popleft()
                if not flow.connection.closed:
                    flow.pending.append(data)
                    self._flush(flow)
            while lane.waiting and lane.pacer.backlog(now) < BACKLOG_S:
                flow = lane.waiting.popleft()
                if not flow.connection.closed:
                    flow.reading = False
                    self._read(flow)

    # -- sockets ------------------------------------------------------------------------------------------------------------------

    def _handle(self, fd: int, event: int) -> None:
        if fd in self._listeners:
            self._accept(*self._listeners[fd])
        elif self._control is not None and fd == self._control.fileno():
            self._command()
        elif fd in self._flows:
            outgoing, incoming = self._flows[fd]
            if event & (select.EPOLLERR | select.EPOLLHUP) and not event & select.EPOLLIN:
                self._close(outgoing.connection)
                return
            if event & select.EPOLLOUT:
                self._flush(incoming)
            if event & select.EPOLLIN and fd in self._flows:
                self._read(outgoing)

    def _accept(self, listener: socket.socket, name: str, source: str) -> None:
        try:
            client, _address = listener.accept()
        except OSError:
            return
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if self._is_down:
                raise ConnectionRefusedError
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.bind((source, 0))
            server.connect(self._target)
        except BlockingIOError:
            pass
        except OSError:
            _reset(client)
            server.close()
            return
        connection = _Connection(name, client, server, self._up, self._down)
        self.stats[name]["connections"] += 1
        self._flows[client.fileno()] = (connection.up, connection.down)
        self._flows[server.fileno()] = (connection.down, connection.up)
        self._epoll.register(client, 0)
        self._epoll.register(server, 0)
        self._fresh.append((time.monotonic() + self._round_trip, connection))

    def _interest(self, sock: socket.socket) -> None:
        outgoing, incoming = self._flows[sock.fileno()]
        self._epoll.modify(sock, (select.EPOLLIN if outgoing.reading else 0) | (select.EPOLLOUT if incoming.pending else 0))

    def _pause(self, flow: _Flow) -> None:
        if flow.reading:
            flow.reading = False
            self._interest(flow.source)

    def _resume(self, flow: _Flow) -> None:
        if not flow.reading:
            flow.reading = True
            self._interest(flow.source)

    def _read(self, flow: _Flow) -> None:
        now = time.monotonic()
        if flow.lane.pacer.backlog(now) >= BACKLOG_S:
            self._pause(flow)
            flow.lane.waiting.append(flow)
            return
        try:
            data = flow.source.recv(READ)
        except BlockingIOError:
            self._resume(flow)
            return
        except OSError:
            self._close(flow.connection)
            return
        flow.lane.queue.append((flow.lane.pacer.book(now, len(data)), flow, data))
        flow.under_way += len(data)
        if not data or flow.under_way >= WINDOW:
            self._pause(flow)
        else:
            self._resume(flow)

    def _flush(self, flow: _Flow) -> None:
        taken = 0
        try:
            while flow.pending:
                data = flow.pending[0]
                if not data:
                    flow.pending.popleft()
                    flow.ended = True
                    flow.sink.shutdown(socket.SHUT_WR)
                    break
                sent = flow.sink.send(memoryview(data)[flow.at :] if flow.at else data)
                taken += sent
                flow.at += sent
                if flow.at == len(data):
                    flow.pending.popleft()
                    flow.at = 0
        except BlockingIOError:
            pass
        except OSError:
            self._close(flow.connection)
            return
        was_full = flow.under_way >= WINDOW
        flow.under_way -= taken
        self.stats[flow.connection.name]["down" if flow.is_down else "up"] += taken
        self._interest(flow.sink)
        if flow.connection.up.ended and flow.connection.down.ended:
            self._close(flow.connection)
        elif was_full and flow.under_way < WINDOW and not flow.ended:
            self._resume(flow)

    def _close(self, connection: _Connection) -> None:
        if connection.closed:
            return
        connection.closed = True
        is_clean = connection.up.ended and connection.down.ended
        for end in (connection.client, connection.server):
            self._flows.pop(end.fileno(), None)
            self._epoll.unregister(end)
            if is_clean:
                end.close()
            else:
                _reset(end)

    def _command(self) -> None:
        assert self._control is not None
        try:
            peer, _address = self._control.accept()
        except OSError:
            return
        with peer:
            peer.settimeout(1)
            try:
                word = peer.recv(100).decode("ascii", "replace").strip()
                if word in {"down", "up"}:
                    self._is_down = word == "down"
                    if self._is_down:
                        for outgoing, _incoming in list(self._flows.values()):
                            self._close(outgoing.connection)
                peer.sendall(json.dumps(self.stats).encode())
            except OSError as exc:
                print(f"link: a control client went away: {exc}", file=sys.stderr)


def _reset(sock: socket.socket) -> None:
    """Close so that the peer sees a reset, not an orderly end that might pass for a short answer."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    sock.close()


def _listener(netns: str, host: str, port: int) -> socket.socket:
    """A listening socket inside another network namespace; a socket stays in the namespace where it was made."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        if netns:
            there = os.open(netns, os.O_RDONLY)
            try:
                if libc.setns(there, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter {netns}")
            finally:
                os.close(there)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
        return listener
    finally:
        libc.setns(home, CLONE_NEWNET)
        os.close(home)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> int:
    """Run the link until a signal or the death of the parent."""
    parser = argparse.ArgumentParser(prog="agent.lab.link")
    parser.add_argument("--target", required=True, type=_address)
    parser.add_argument("--control", required=True)
    parser.add_argument("--listen", action="append", default=[], metavar="NAME=NETNS,HOST:PORT,SOURCE")
    parser.add_argument("--round-trip", type=float, default=0.02, help="seconds")
    parser.add_argument("--rate", type=float, default=50e6, help="bytes a second in each direction; 0 is unlimited")
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    link = Link(args.target, args.rate, args.round_trip)
    for item in args.listen:
        name, _, rest = item.partition("=")
        netns, address, source = rest.split(",")
        link.listen(name, _listener(netns, *_address(address)), source)
    link.control(args.control)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, link.stop)
    print("ready", flush=True)
    link.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
