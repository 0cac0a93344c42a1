"""Resuming a deflate stream in the middle, at a bit, with zlib's ordinary interface (formats.md 5.1).

zlib can be given the output before the place (a preset dictionary of a raw stream), but Python has no `inflatePrime` for the bits
of a byte that belong to what comes. So the stream is given a *filler* first: empty deflate blocks, which give no output, of
such a length that the leftover bits end its last byte and the stream goes on at a byte's border. An empty block with fixed codes has 10
bits, which changes the phase by two; one with dynamic codes of 97 bits makes it odd.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from isal import isal_zlib

_ORDER: Final = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
"""In which a block says the lengths of its code length codes (RFC 1951 3.2.7)."""
_FIXED: Final = (0, 1, 0) + (0,) * 7
"""Not the last block, fixed codes, end of block."""


def _number(value: int, count: int) -> list[int]:
    return [value >> at & 1 for at in range(count)]


def _dynamic() -> list[int]:
    """Not the last block, dynamic codes of which only "end of block" has one: 256 lengths of zero, told with three repeats."""
    lengths = {18: 1, 1: 2, 17: 2}
    zeros, one, few = [0], [1, 0], [1, 1]  # the canonical codes for 18, 1 and 17
    bits = [0, 0, 1, *_number(0, 5), *_number(0, 5), *_number(14, 4)]
    for symbol in _ORDER[:18]:
        bits += _number(lengths.get(symbol, 0), 3)
    for zero_code, repeat, width in ((zeros, 138 - 11, 7), (zeros, 115 - 11, 7), (few, 3 - 3, 3)):
        bits += [*zero_code, *_number(repeat, width)]
    return [*bits, *one, *one, 0]


def _pack(bits: Sequence[int]) -> bytes:
    return bytes(sum(bit << place for place, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8))


@lru_cache(maxsize=2048)
def filler(bits: int, prime: int) -> bytes:
    """Whole bytes of empty blocks that end in the `bits` (1 to 7) high bits of byte `prime`."""
    phase = 8 - bits
    out = _dynamic() if phase % 2 else []
    while len(out) % 8 != phase:
        out += _FIXED
    return _pack([*out, *_number(prime >> (8 - bits), bits)])


def resume_deflate(bits: int, prime: int, window: bytes) -> "isal_zlib.Decompress":
    """A decompressor that goes on behind `window`, with the `bits` high bits of `prime` before the next byte it is fed."""
    inflater = isal_zlib.decompressobj(-15, zdict=window) if window else isal_zlib.decompressobj(-15)
    if bits:
        inflater.decompress(filler(bits, prime))
    return inflater
