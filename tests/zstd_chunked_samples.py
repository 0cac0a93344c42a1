"""zstd:chunked blobs read without a network: what a driver answers, and chunks decoded by plain zstandard."""

from collections.abc import Mapping

import zstandard

from agent.formats.model import LayerIndex, digest_of
from agent.formats.opening import BlobRange, LayerFacts
from agent.formats.zstd_chunked import FORMAT


def read_index(blob: bytes, annotations: Mapping[str, str], media_type: str = "", *, guess: int = 0) -> LayerIndex:
    """Answer what the format wants; `guess` bytes at most where it guesses."""
    facts = LayerFacts(digest_of(blob), len(blob), media_type, annotations)
    reader = FORMAT.read_index(facts)
    answer: bytes | None = None
    while True:
        try:
            want = reader.send(answer)  # type: ignore[arg-type]
        except StopIteration as stop:
            index: LayerIndex = stop.value
            return index
        assert isinstance(want, BlobRange)
        assert 0 <= want.start <= want.stop <= len(blob)
        answer = blob[want.start : want.stop]
        if want.is_guess and guess:
            answer = answer[-guess:]


def read_volume(index: LayerIndex, blob: bytes) -> bytes:
    """The volume, every chunk decoded on its own and compared with its digest."""
    volume, chunks = bytearray(index.volume_size), index.chunks
    for number in range(len(chunks)):
        start, length = chunks.blob_offset[number], chunks.blob_length[number]
        decoder = zstandard.ZstdDecompressor().decompressobj()
        data = decoder.decompress(blob[start : start + length])
        data = data[chunks.inner_offset[number] :][: chunks.size[number]]
        assert chunks.is_right(number, data)
        place = chunks.volume_offset[number]
        volume[place : place + len(data)] = data
    return bytes(volume)
