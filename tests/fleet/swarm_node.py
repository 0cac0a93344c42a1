"""A node of `test_swarm_processes.py`, in a process of its own: a swarm and a data server over made-up blobs.

Reads one JSON command a line from stdin and answers with one JSON line.
"""

import hashlib
import json
import sys
from typing import Any

import structlog
import trio

from agent.errors import SourceError
from agent.formats.model import Digest
from agent.swarm import FleetSecret, Possession, Swarm, make_credentials, new_identity, open_swarm
from agent.transfer import PeerClient, open_data_server, open_peer_client

PIECE = 64 << 10


def piece_bytes(blob: Digest, piece: int) -> bytes:
    """What every node agrees is in a piece."""
    return hashlib.shake_128(f"{blob}/{piece}".encode()).digest(PIECE)


class Node:
    """Pieces held by this process."""

    def __init__(self) -> None:
        self.held: dict[Digest, int] = {}
        self.counts: dict[Digest, int] = {}
        self.lies = False

    def possession(self, blob: Digest) -> Possession | None:
        if blob not in self.held:
            return None
        count = self.counts[blob]
        return Possession(blob, count * PIECE, count, self.held[blob].to_bytes((count + 7) // 8, "little"))

    def blobs(self) -> list[Digest]:
        return list(self.held)

    def blob_size(self, blob: Digest) -> int | None:
        return self.counts[blob] * PIECE if blob in self.counts else None

    def has_range(self, blob: Digest, start: int, stop: int) -> bool:
        return all(self.held[blob] >> piece & 1 for piece in range(start // PIECE, -(-stop // PIECE)))

    async def read_range(self, blob: Digest, start: int, stop: int) -> bytes | None:
        await trio.lowlevel.checkpoint()
        data = b"".join(piece_bytes(blob, piece) for piece in range(start // PIECE, -(-stop // PIECE)))
        data = data[start % PIECE :][: stop - start]
        return bytes(len(data)) if self.lies else data


class Shell:
    """Carries out commands."""

    def __init__(self, node: Node, swarm: Swarm, client: PeerClient) -> None:
        self.node, self.swarm, self.client = node, swarm, client

    async def hold(self, blob: Digest, count: int, pieces: list[int]) -> None:
        self.node.counts[blob] = count
        self.node.held[blob] = self.node.held.get(blob, 0) | sum(1 << piece for piece in pieces)
        self.swarm.possession_changed(blob, pieces)

    async def want(self, blob: Digest, timeout_s: float = 5) -> list[str]:
        await self.swarm.want(blob)
        return [holder.peer_id for holder in await self.swarm.wait_holders(blob, timeout_s)]

    async def holders(self, blob: Digest) -> dict[str, list[int]]:
        return {
            h.peer_id: [piece for piece in range(h.possession.pieces) if h.possession.has_piece(piece)]
            for h in self.swarm.holders(blob)
        }

    async def fetch(self, blob: Digest, peer_id: str, piece: int) -> str:
        """ "ok", "lied" or the class of the error."""
        holder = next(h for h in self.swarm.holders(blob) if h.peer_id == peer_id)
        extent = (piece * PIECE, (piece + 1) * PIECE)
        try:
            async with self.client.fetch_ranges(holder, blob, holder.possession.blob_size, [extent]) as items:
                data = b"".join([part async for _, part in items])
        except SourceError as exc:
            self.swarm.report_failure(peer_id)
            return type(exc).__name__
        if data != piece_bytes(blob, piece):
            self.swarm.report_liar(peer_id, blob)
            return "lied"
        return "ok"

    async def lie(self) -> None:
        self.node.lies = True

    async def peers(self) -> list[str]:
        return sorted(info.peer_id for info in self.swarm.peers())

    async def memory(self) -> int:
        with open("/proc/self/statm") as file:  # noqa: ASYNC230 - procfs does not block
            return int(file.read().split()[1]) * 4096


async def main() -> None:
    secret, bootstrap = sys.argv[1], sys.argv[2:]
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    node, identity = Node(), new_identity()
    credentials = make_credentials(FleetSecret(secret.encode()), identity)
    async with (
        open_data_server("127.0.0.1:0", credentials.server_context, node) as server,
        open_peer_client(credentials.client_context) as client,
        open_swarm(
            identity,
            credentials,
            listen="/ip4/127.0.0.1/tcp/0",
            bootstrap=bootstrap,
            source=node,
            data_address=f":{server.port}",
            load=server.load,
            on_peer=lambda info: client.warm(info.peer_id, info.data_address),
        ) as swarm,
    ):
        shell = Shell(node, swarm, client)
        answer({"peer_id": swarm.peer_id, "address": swarm.addresses[0].partition("/p2p/")[0]})
        lines = trio.lowlevel.FdStream(0)
        buffer = b""
        while data := await lines.receive_some():
            *complete, buffer = (buffer + data).split(b"\n")
            for line in complete:
                name, *arguments = json.loads(line)
                answer(await getattr(shell, name)(*arguments))


def answer(value: Any) -> None:
    """One line to the test."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    trio.run(main)
