"""The FUSE handshake as bytes: who answers the kernel's INIT, and how a successor's libfuse is brought to the same state.

The holder, not libfuse, answers the INIT request that the kernel sends once a mount. So the answer does not depend on which
worker lives, and it holds what pyfuse3 cannot set: how many requests may be parked, and the largest READ.

A worker (the first as well as each successor) gives its own libfuse a made-up INIT over a socket pair, then puts the real
descriptor in the socket's place (`fsmount.takeover`).

Layouts, little-endian: request header u32 length, u32 opcode, u64 unique, u64 node, u32 uid, u32 gid, u32 pid, u32 padding; INIT
body u32 major, u32 minor, u32 max_readahead, u32 flags, u32 flags2, 44 reserved; answer header u32 length, i32 error,
u64 unique; INIT answer as in `_ANSWER`. See linux/fuse.h.
"""

import struct
from typing import Final

_REQUEST: Final = struct.Struct("<IIQQIIII")
_INIT: Final = struct.Struct("<IIIII44x")
_REPLY: Final = struct.Struct("<IiQ")
_ANSWER: Final = struct.Struct("<IIIIHHIIHHI28x")
_INIT_OPCODE: Final = 26
_NOTIFY_RESEND: Final = 7

_MAJOR: Final = 7
_MINOR: Final = 38
"""The version that libfuse 3.14 speaks; later fields are not used here."""

_INIT_EXT: Final = 1 << 30

_WANTED: Final = (
    1 << 0  # ASYNC_READ: read-ahead runs as several requests at once
    | 1 << 13  # DO_READDIRPLUS, without the adaptive form: pyfuse3 has no plain READDIR
    | 1 << 15  # ASYNC_DIO
    | 1 << 18  # PARALLEL_DIROPS
    | 1 << 20  # POSIX_ACL: the kernel reads and applies the ACLs of a tree
    | 1 << 22  # MAX_PAGES, for READs of 1 MiB
    | 1 << 23  # CACHE_SYMLINKS
)

MAX_READ: Final = 1 << 20
"""Largest READ: 256 pages, the kernel's own limit (fs.fuse.max_pages_limit)."""

MAX_BACKGROUND: Final = 4096
"""Read-ahead requests in flight at once. The kernel's default of 12 would let 12 parked misses stop all other read-ahead."""


def answer_init(request: bytes) -> bytes:
    """The answer to the kernel's INIT request.

    Raises:
        ValueError: it is not an INIT, or of another major version.
    """
    if len(request) < _REQUEST.size + 16:
        raise ValueError(f"a FUSE request of {len(request)} bytes instead of INIT")
    _length, opcode, unique, *_rest = _REQUEST.unpack_from(request)
    major, minor, readahead, flags = struct.unpack_from("<IIII", request, _REQUEST.size)
    if opcode != _INIT_OPCODE or major != _MAJOR:
        raise ValueError(f"FUSE request {opcode} of version {major}.{minor} instead of INIT 7")
    body = _ANSWER.pack(
        _MAJOR,
        min(minor, _MINOR),
        readahead,
        flags & _WANTED,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        4096,
        1,
        MAX_READ // 4096,
        0,
        0,
    )
    return _REPLY.pack(_REPLY.size + len(body), 0, unique) + body


def made_up_init() -> bytes:
    """An INIT request for libfuse that offers it every capability but the extended flags."""
    body = _INIT.pack(_MAJOR, _MINOR, 128 << 10, 0xFFFFFFFF & ~_INIT_EXT, 0)
    return _REQUEST.pack(_REQUEST.size + len(body), _INIT_OPCODE, 1, 0, 0, 0, 0, 0) + body


def resend_notice() -> bytes:
    """FUSE_NOTIFY_RESEND (Linux 6.9): what a predecessor had read and not answered comes again."""
    return _REPLY.pack(_REPLY.size, _NOTIFY_RESEND, 0)
