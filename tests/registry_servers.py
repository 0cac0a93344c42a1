"""Servers for tests of the registry client: a real registry on a free loopback port, and one that does what a test tells it."""

import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

USER, PASSWORD = "shoal", "secret"
_HTPASSWD = f"{USER}:$2b$04$MnaD9brWe3ilq2myT22AAeSoVLAyqNYq2KVhR5hWM2Wwg2Iv8zqX.\n"  # bcrypt of PASSWORD, the cheapest cost


@attrs.define
class RealRegistry:
    """Debian's docker-registry over a temporary directory."""

    host: str
    log: list[str]

    def requests(self) -> list[str]:
        """Lines of its access log."""
        return [line for line in self.log if '"' in line and " HTTP/1.1" in line]


@contextmanager
def open_real_registry(folder: Path, *, auth: bool = False) -> Iterator[RealRegistry]:
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("no docker-registry: apt-get install docker-registry")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yml"
    text = f"""
version: 0.1
log: {{level: info, formatter: text, accesslog: {{disabled: false}}}}
storage:
  filesystem: {{rootdirectory: {folder}/data}}
  delete: {{enabled: true}}
http: {{addr: "127.0.0.1:0", secret: for-tests}}
"""
    if auth:
        (folder / "htpasswd").write_text(_HTPASSWD)
        text += f"auth:\n  htpasswd: {{realm: tests, path: {folder}/htpasswd}}\n"
    config.write_text(text)
    process = subprocess.Popen([program, "serve", str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    address: list[str] = []
    ready = threading.Event()

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "listening on " in line and not address:
                address.append(line.partition("listening on ")[2].partition('"')[0].strip())
                ready.set()
        ready.set()

    reader = threading.Thread(target=follow)
    reader.start()
    try:
        assert ready.wait(20)
        assert address, "".join(lines)
        yield RealRegistry(address[0], lines)
    finally:
        process.terminate()
        process.wait(10)
        reader.join(10)
        assert process.stdout is not None
        process.stdout.close()


@attrs.define
class Asked:
    """One request that came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    def range(self) -> tuple[int, int] | None:
        """The only range asked for, half-open."""
        text = self.headers.get("range")
        if text is None:
            return None
        first, _, last = text.removeprefix("bytes=").partition("-")
        return int(first), int(last) + 1


@attrs.define
class Reply:
    """What to answer. `length` is what Content-Length says (None: the truth, -1: no such header); after `cut` bytes of the body
    the connection is closed, or nothing more comes if `hangs`; `drip_s` waits before each byte of the body, or of `raw`."""

    status: int = 200
    headers: dict[str, str] = attrs.field(factory=dict)
    body: bytes = b""
    length: int | None = None
    cut: int | None = None
    hangs: bool = False
    drip_s: float = 0.0
    raw: bytes | None = None
    is_chunked: bool = False

    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} Whatever"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.is_chunked:
            lines.append("Transfer-Encoding: chunked")
        elif self.length != -1 and self.status not in {204, 304}:
            lines.append(f"Content-Length: {len(self.body) if self.length is None else self.length}")
        return "\r\n".join(lines).encode() + b"\r\n\r\n"


Handler = Callable[[Asked], Reply | Awaitable[Reply]]


@attrs.define
class ScriptedServer:
    """An HTTP server that answers as its `handler` says and remembers what was asked."""

    port: int
    handler: Handler
    scheme: str = "http"
    name: str = "127.0.0.1"
    asked: list[Asked] = attrs.field(factory=list)
    aborted: int = 0
    sent: int = 0
    connections: int = 0

    @property
    def host(self) -> str:
        return f"{self.name}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}"

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        number = self.connections
        buffer = bytearray()
        try:
            while True:
                while b"\r\n\r\n" not in buffer:
                    data = await stream.receive_some(65536)
                    if not data:
                        return
                    buffer += data
                head, _, rest = bytes(buffer).partition(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").split("\r\n")
                method, target, _ = first.split(" ")
                headers = {}
                for line in lines:
                    name, _, value = line.partition(":")
                    headers[name.lower()] = value.strip()
                size = int(headers.get("content-length", "0"))
                body = bytearray(rest)
                while len(body) < size:
                    data = await stream.receive_some(65536)
                    if not data:
                        return
                    body += data
                buffer = body[size:]
                asked = Asked(method, target, headers, bytes(body[:size]), number)
                self.asked.append(asked)
                reply = self.handler(asked)
                if not isinstance(reply, Reply):
                    reply = await reply
                if not await self._answer(stream, method, reply):
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.aborted += 1
        finally:
            with trio.move_on_after(1, shield=True):
                await stream.aclose()

    async def _answer(self, stream: trio.abc.Stream, method: str, reply: Reply) -> bool:
        data = reply.raw if reply.raw is not None else reply.head()
        body = reply.body if method != "HEAD" else b""
        if reply.is_chunked:
            body = (
                b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 9000]), body[at : at + 9000]) for at in range(0, len(body), 9000))
                + b"0\r\n\r\n"
            )
        if reply.raw is None:
            data += body if reply.cut is None else body[: reply.cut]
        if reply.drip_s:
            start = 0 if reply.raw is not None else len(reply.head())
            await stream.send_all(data[:start])
            for at in range(start, len(data)):
                await trio.sleep(reply.drip_s)
                await stream.send_all(data[at : at + 1])
        else:
            for at in range(0, len(data), 65536):
                await stream.send_all(data[at : at + 65536])
                self.sent += len(data[at : at + 65536])
        if reply.hangs:
            while await stream.receive_some(65536):
                pass
            return False
        return reply.cut is None and reply.raw is None and reply.length in {None, len(reply.body)}


@asynccontextmanager
async def open_scripted_server(
    handler: Handler, *, ssl_context: Any = None, name: str = "127.0.0.1"
) -> AsyncIterator[ScriptedServer]:
    listeners: list[Any] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    if ssl_context is not None:
        listeners = [trio.SSLListener(listener, ssl_context, https_compatible=True) for listener in listeners]
    server = ScriptedServer(port, handler, "https" if ssl_context else "http", name)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.serve, listeners)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()


def closed_port() -> int:
    """A loopback port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
