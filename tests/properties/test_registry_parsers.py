"""References, challenges, ranges and multipart bodies: round trips, any cut of the input, no crash on garbage."""

import contextlib
import itertools
import string

from hypothesis import example, given
from hypothesis import strategies as st

from agent.formats.model import FormatError
from agent.registry.challenges import Challenge, parse_challenges
from agent.registry.complaints import complaint
from agent.registry.credentials import config_key, parse_docker_config, parse_helper_answer
from agent.registry.manifests import parse_manifest
from agent.registry.multipart import MultipartParser, boundary_of
from agent.registry.ranges import RangeMismatch, WantedRanges, bridge, merge, parse_content_range
from agent.registry.redirects import BadRedirect, SignedUrl, next_hop
from agent.registry.references import ImageReference
from agent.registry.referrers import next_page

labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
registries = st.one_of(
    st.tuples(labels, labels).map(".".join),
    st.tuples(labels, st.integers(1, 65535)).map(lambda pair: f"{pair[0]}:{pair[1]}"),
    st.just("localhost"),
    st.just("[::1]:5000"),
    st.just("docker.io"),
)
components = st.from_regex(r"[a-z0-9]{1,6}((\.|_|__|-{1,3})[a-z0-9]{1,4})?", fullmatch=True)
repositories = st.lists(components, min_size=2, max_size=4).map("/".join)
tags = st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
digests = st.none() | st.text("0123456789abcdef", min_size=64, max_size=64).map("sha256:".__add__)


@given(registries, repositories, tags, digests)
def test_reference_round_trip(registry: str, repository: str, tag: str | None, digest: str | None) -> None:
    text = f"{registry}/{repository}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    ref = ImageReference.parse(text)
    assert (ref.registry, ref.repository, ref.digest) == (registry, repository, digest)
    assert ref.tag == (tag or (None if digest else "latest"))
    assert ImageReference.parse(str(ref)) == ref


@given(st.text() | st.text(string.ascii_letters + string.digits + "/:@.-_[]", max_size=60))
def test_reference_never_crashes(text: str) -> None:
    try:
        ref = ImageReference.parse(text)
    except FormatError:
        return
    assert ImageReference.parse(str(ref)) == ref
    assert "/../" not in f"/{ref.repository}/"
    assert not ref.repository.startswith("/")


tokens = st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=12)
values = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
challenges = st.builds(Challenge, tokens.map(str.lower), st.dictionaries(tokens.map(str.lower), values, max_size=5))


@given(st.lists(challenges, max_size=4), st.sampled_from([", ", ",", " , ,"]))
def test_challenge_round_trip(wanted: list[Challenge], separator: str) -> None:
    def quote(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    line = separator.join(
        challenge.scheme + " " + separator.join(f"{name}={quote(value)}" for name, value in challenge.params.items())
        for challenge in wanted
    )
    found = parse_challenges([line])
    assert [(one.scheme, dict(one.params)) for one in found] == [(one.scheme, dict(one.params)) for one in wanted]


@given(st.lists(st.text(max_size=200), max_size=3))
@example(['Bearer realm="unterminated'])
@example(["=,=,= Basic"])
@example(["Negotiate abc==, Basic realm=x"])
def test_challenges_never_crash(lines: list[str]) -> None:
    for challenge in parse_challenges(lines):
        assert challenge.scheme == challenge.scheme.lower()


SIZE = 5000
BLOB = bytes(at * 7 % 251 for at in range(SIZE))
spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))


@given(st.lists(spans, max_size=8), st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 700)), max_size=40))
def test_wanted_ranges_against_a_set(ranges: list[tuple[int, int]], arrivals: list[tuple[int, int]]) -> None:
    wanted = WantedRanges(merge(ranges, SIZE))
    left = {at for start, stop in ranges for at in range(start, stop)}
    for start, length in [*arrivals, (0, SIZE)]:
        data = BLOB[start : start + length]
        got: set[int] = set()
        for offset, part in wanted.take(start, data):
            assert part
            assert part == BLOB[offset : offset + len(part)]
            assert not got & set(range(offset, offset + len(part)))
            got |= set(range(offset, offset + len(part)))
        assert got == left & set(range(start, start + len(data)))
        left -= got
        assert {at for first, last in wanted.missing() for at in range(first, last)} == left
        assert bool(wanted) == bool(left)
        assert wanted.stop == (max(left) + 1 if left else 0)
    assert not wanted


@given(st.lists(spans, max_size=8), st.integers(0, 500))
def test_bridge_covers_and_leaves_no_small_gap(ranges: list[tuple[int, int]], gap: int) -> None:
    merged = merge(ranges, SIZE)
    bridged = bridge(merged, gap)
    assert all(any(first <= start and stop <= last for first, last in bridged) for start, stop in merged)
    assert all(later[0] - earlier[1] > gap for earlier, later in itertools.pairwise(bridged))


def multipart(parts: list[tuple[int, int]], boundary: bytes, preamble: bytes, epilogue: bytes) -> bytes:
    out = preamble + (b"\r\n" if preamble else b"")
    for start, stop in parts:
        out += b"--" + boundary + b"\r\nContent-Type: application/octet-stream\r\n"
        out += b"content-range:  bytes %d-%d/%d\r\n\r\n" % (start, stop - 1, SIZE) + BLOB[start:stop] + b"\r\n"
    return out + b"--" + boundary + b"--" + epilogue


filled = spans.filter(lambda span: span[0] < span[1])


@given(
    st.lists(filled, max_size=6),
    st.text("abcXYZ0189'()+_,-./:=?", min_size=1, max_size=70).map(str.encode),
    st.sampled_from([b"", b"a preamble", b"--", b"\r\n\r\n"]),
    st.sampled_from([b"", b"\r\n", b"\r\nan epilogue\r\n"]),
    st.lists(st.integers(0, 3000), max_size=12),
    st.booleans(),
)
def test_multipart_any_cut(
    parts: list[tuple[int, int]], boundary: bytes, preamble: bytes, epilogue: bytes, cuts: list[int], bytewise: bool
) -> None:
    body = multipart(parts, boundary, preamble if b"--" + boundary not in preamble else b"", epilogue)
    if bytewise:
        body_parts = [body[at : at + 1] for at in range(len(body))]
    else:
        edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
        body_parts = [body[start:stop] for start, stop in itertools.pairwise(edges)]
    parser = MultipartParser(boundary, SIZE)
    got: list[tuple[int, bytes]] = []
    for data in body_parts:
        assert not (parser.done and data.startswith(b"--" + boundary))
        got += parser.feed(data)
    assert parser.done
    joined: list[tuple[int, bytes]] = []
    pending = list(got)
    for start, stop in parts:
        data, at = b"", start
        while len(data) < stop - start:
            offset, part = pending.pop(0)
            assert offset == at
            data, at = data + part, at + len(part)
        joined.append((start, data))
    assert not pending
    assert joined == [(start, BLOB[start:stop]) for start, stop in parts]


@given(st.lists(filled, min_size=1, max_size=3), st.integers(0, 10_000), st.binary(max_size=10), st.integers(1, 200))
def test_multipart_damaged(parts: list[tuple[int, int]], at: int, damage: bytes, step: int) -> None:
    body = multipart(parts, b"xyz", b"", b"")
    at %= len(body)
    body = body[:at] + damage + body[at + len(damage) :]
    parser = MultipartParser(b"xyz", SIZE)
    total = 0
    try:
        for start in range(0, len(body), step):
            for offset, part in parser.feed(body[start : start + step]):
                assert offset >= 0
                assert offset + len(part) <= SIZE
                total += len(part)
    except RangeMismatch:
        pass
    assert total <= len(body)


@given(st.binary(max_size=2000))
def test_multipart_garbage(data: bytes) -> None:
    with contextlib.suppress(RangeMismatch):
        MultipartParser(b"a", SIZE).feed(b"--a\r\n" + data)


@given(st.text(max_size=80) | st.from_regex(r"multipart/byteranges; ?boundary=.*"))
def test_boundary_never_crashes(text: str) -> None:
    with contextlib.suppress(RangeMismatch):
        assert 0 < len(boundary_of(text)) <= 70


@given(st.none() | st.text(max_size=60) | st.from_regex(r"bytes \d{1,25}-\d{1,25}/(\d{1,25}|\*)"))
def test_content_range_is_inside_the_blob(text: str | None) -> None:
    try:
        found = parse_content_range(text, SIZE)
    except RangeMismatch:
        return
    assert 0 <= found.start < found.stop <= SIZE
    assert found.total in {None, SIZE}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "schemaVersion",
                    "mediaType",
                    "config",
                    "layers",
                    "manifests",
                    "digest",
                    "size",
                    "platform",
                    "os",
                    "architecture",
                    "annotations",
                    "urls",
                    "errors",
                    "auths",
                    "credHelpers",
                    "credsStore",
                    "auth",
                    "username",
                    "password",
                    "identitytoken",
                    "Username",
                    "Secret",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(json_values)
def test_json_from_outside_never_crashes(value: object) -> None:
    import json

    raw = json.dumps(value).encode()
    with contextlib.suppress(FormatError):
        parse_manifest(raw, "")
    with contextlib.suppress(ValueError):
        parse_docker_config(raw)
    parse_helper_answer(raw)
    assert "\n" not in complaint(raw)


@given(st.binary(max_size=300))
def test_bytes_from_outside_never_crash(raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        parse_manifest(raw, "")
    parse_helper_answer(raw)
    complaint(raw)
    with contextlib.suppress(ValueError):
        parse_docker_config(raw)


@given(st.text(max_size=100))
def test_config_key_is_stable(text: str) -> None:
    key = config_key(text)
    assert "://" not in text or not key.startswith("https://")


@given(
    st.sampled_from(["https://a/v2/x", "http://a:5000/v2/x"]),
    st.text(max_size=100) | st.from_regex(r"https?://[a-z@:\[\]0-9]{0,20}(/.*)?"),
)
def test_redirects_stay_http_and_never_leave_tls(current: str, location: str) -> None:
    try:
        url = next_hop(current, location)
    except BadRedirect:
        return
    assert url.startswith(("https://", "http://"))
    assert not (current.startswith("https") and url.startswith("http:"))
    SignedUrl.of(url, 1000.0)


targets = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="<>"), min_size=1, max_size=40)


@given(st.lists(targets, max_size=3), targets, st.sampled_from(['rel="next"', "rel=next", 'a=b; REL = "Next"', "rel=next; x"]))
def test_next_page_is_found_among_other_links(others: list[str], target: str, parameters: str) -> None:
    links = [f'<{other}>; rel="first"' for other in others]
    assert next_page(", ".join(links)) is None
    assert next_page(", ".join([*links, f"<{target}>; {parameters}", *links])) == target


@given(st.text() | st.text('<>;,="rel next/', max_size=60))
def test_next_page_never_crashes(header: str) -> None:
    found = next_page(header)
    assert found is None or f"<{found}>" in header
