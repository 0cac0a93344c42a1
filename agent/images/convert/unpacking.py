"""From a layer's blob to its tar, in a worker thread: checked against both digests, in bounded memory."""

import hashlib
from pathlib import Path
from typing import Final

import trio

from agent.formats.inflate import open_inflater, sniff
from agent.formats.model import Digest, FormatError
from agent.images.convert.places import Tick

_READ: Final = 256 << 10


def unpack(blob: Path, digest: Digest, tar: Path, diff_id: Digest, tick: Tick) -> int:
    """Write the uncompressed tar of a gzip, zstd or uncompressed layer to a file; gives its size.

    Raises:
        FormatError: the blob is damaged, or is not what its digest or diff ID says.
    """
    packed, plain, size = hashlib.sha256(), hashlib.sha256(), 0
    with blob.open("rb") as file, tar.open("wb") as output:
        head = file.read(4)
        file.seek(0)
        inflater = open_inflater(sniff(head))
        try:
            while data := file.read(_READ):
                packed.update(data)
                tick(len(data))
                for piece in inflater.feed(memoryview(data)):
                    trio.from_thread.check_cancelled()
                    plain.update(piece)
                    size += output.write(piece)
            inflater.finish()
        except FormatError as exc:
            raise FormatError(f"layer {digest}: {exc}") from exc
    _compare(digest, packed.hexdigest())
    if "sha256:" + plain.hexdigest() != diff_id:
        raise FormatError(f"layer {digest} unpacks to sha256:{plain.hexdigest()}, and the config promises {diff_id}")
    return size


def verify(blob: Path, digest: Digest, tick: Tick) -> None:
    """Hash a file.

    Raises:
        FormatError: its digest is another one.
    """
    packed = hashlib.sha256()
    with blob.open("rb") as file:
        while data := file.read(_READ):
            trio.from_thread.check_cancelled()
            packed.update(data)
            tick(len(data))
    _compare(digest, packed.hexdigest())


def _compare(digest: Digest, found: str) -> None:
    if "sha256:" + found != digest:
        raise FormatError(f"blob {digest} is damaged: its bytes have the digest sha256:{found}")
