import struct

import pytest

from fsmount.arguments import parse_flags
from fsmount.handshake import MAX_BACKGROUND, answer_init, made_up_init, resend_notice

READDIRPLUS, READDIRPLUS_AUTO, MAX_PAGES = 1 << 13, 1 << 14, 1 << 22


def init_request(opcode: int = 26, major: int = 7, minor: int = 45, flags: int = 0xFFFFFFFF) -> bytes:
    body = struct.pack("<IIIII44x", major, minor, 131072, flags, 0xFFFFFFFF)
    return struct.pack("<IIQQIIII", 40 + len(body), opcode, 77, 0, 0, 0, 0, 0) + body


def test_the_answer_names_what_the_worker_can_do() -> None:
    answer = answer_init(init_request())
    length, error, unique = struct.unpack_from("<IiQ", answer)
    major, minor, readahead, flags, background, _congestion, _write, _gran, pages = struct.unpack_from("<IIIIHHIIH", answer, 16)
    assert (length, error, unique) == (80, 0, 77)
    assert (major, minor, readahead) == (7, 38, 131072)
    assert flags & READDIRPLUS
    assert not flags & READDIRPLUS_AUTO
    assert (background, pages) == (MAX_BACKGROUND, 256)


def test_only_what_the_kernel_offers_is_wanted() -> None:
    answer = answer_init(init_request(minor=31, flags=MAX_PAGES))
    assert struct.unpack_from("<IIII", answer, 16) == (7, 31, 131072, MAX_PAGES)


@pytest.mark.parametrize("request_", [b"", init_request(opcode=1), init_request(major=8), init_request()[:50]])
def test_something_else_than_init(request_: bytes) -> None:
    with pytest.raises(ValueError, match="FUSE request"):
        answer_init(request_)


def test_made_up_messages_have_their_length() -> None:
    for message in (made_up_init(), resend_notice()):
        assert struct.unpack_from("<I", message)[0] == len(message)


def test_flags() -> None:
    assert parse_flags(["--run-dir", "/run", "--mount", "x"]) == {"run-dir": "/run", "mount": "x"}
    for wrong in (["--run-dir"], ["run-dir", "/run"]):
        with pytest.raises(SystemExit):
            parse_flags(wrong)
