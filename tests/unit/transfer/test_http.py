import pytest

from agent.transfer.http import (
    Answer,
    Request,
    content_range,
    join_ranges,
    parse_answer,
    parse_content_range,
    parse_request,
    range_header,
    request_head,
)

BLOB = "sha256:" + "0f" * 32
PATH = f"/v1/blobs/{BLOB}"


def test_round_trip() -> None:
    headers = [(b"Range", range_header(10, 20).encode())]
    assert parse_request(PATH, headers) == Request(BLOB, 10, 20)
    assert parse_content_range(content_range(10, 20, 100).decode()) == (10, 20, 100)


def test_open_and_missing_ranges() -> None:
    assert parse_request(PATH, []) == Request(BLOB, 0, None)
    assert parse_request(PATH, [(b"range", b"bytes=7-")]) == Request(BLOB, 7, None)


@pytest.mark.parametrize(
    "path", ["/", "/v1/blobs/", PATH + "/", PATH.upper(), "/v1/blobs/sha256:" + "0g" * 32, PATH + "\n", "/../etc/passwd"]
)
def test_no_such_path(path: str) -> None:
    assert parse_request(path, []) == 404


@pytest.mark.parametrize(
    "value",
    [b"", b"bytes=-5", b"bytes=5-4", b"bytes=1-2,4-5", b"bytes=x-y", b"items=1-2", b"bytes=1-2 ", b"bytes=" + b"9" * 20 + b"-"],
)
def test_ranges_not_spoken(value: bytes) -> None:
    assert parse_request(PATH, [(b"range", value)]) == 400
    assert parse_request(PATH, [(b"range", b"bytes=0-1"), (b"range", b"bytes=0-1")]) == 400


@pytest.mark.parametrize("text", ["", "bytes 5-4/10", "bytes 0-10/10", "bytes 0-1/*", "bytes */10", "bytes 0-1/10 "])
def test_content_range_must_make_sense(text: str) -> None:
    assert parse_content_range(text) is None


def test_join_ranges() -> None:
    assert join_ranges([(5, 7), (0, 2), (2, 4), (6, 9), (9, 9)]) == [(0, 4), (5, 9)]
    assert join_ranges([]) == []


def test_answers() -> None:
    assert parse_answer(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\nX: a:b ") == Answer(
        206, {"content-length": "5", "x": "a:b"}, 5
    )
    assert parse_answer(b"HTTP/1.1 204 ") == Answer(204, {}, 0)
    assert request_head("/x", "h:1", (0, 5)) == b"GET /x HTTP/1.1\r\nHost: h:1\r\nRange: bytes=0-4\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.0 206 x\r\ncontent-length: 5",
        b"HTTP/1.1 206 x",
        b"HTTP/1.1 100 Continue\r\ncontent-length: 0",
        b"HTTP/1.1 206 x\r\ncontent-length: -5",
        b"HTTP/1.1 206 x\r\ncontent-length: 5\r\ncontent-length: 6",
        b"HTTP/1.1 206 x\r\ncontent-length: 5\r\ntransfer-encoding: chunked",
        b"HTTP/1.1 206 x\r\ncontent-length: 5\r\n folded",
        b"HTTP/1.1 206 x\r\ncontent-length : 5",
        b"HTTP/1.1 2060 x\r\ncontent-length: 5",
        b"\xff" * 50,
    ],
)
def test_answers_that_are_none(head: bytes) -> None:
    assert parse_answer(head) is None
