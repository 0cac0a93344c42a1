"""References, manifests, hosts files, credentials, expiries: the cases that specifications and real registries name."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.errors import SettingsError
from agent.formats.model import FormatError, digest_of
from agent.registry import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Credentials,
    ImageIndex,
    ImageReference,
    Manifest,
    Platform,
    parse_manifest,
)
from agent.registry.challenges import parse_challenges
from agent.registry.credentials import config_key, parse_docker_config, parse_helper_answer
from agent.registry.hosts import default_host, host_directories, is_loopback, load_hosts, parse_hosts
from agent.registry.multipart import MultipartParser, boundary_of
from agent.registry.ranges import RangeMismatch
from agent.registry.redirects import BadRedirect, SignedUrl, next_hop, url_expiry
from agent.registry.retries import backoff_s, parse_retry_after

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest"),
    [
        ("alpine", "docker.io", "library/alpine", "latest", None),
        ("alpine:3", "docker.io", "library/alpine", "3", None),
        ("user/app", "docker.io", "user/app", "latest", None),
        ("index.docker.io/alpine", "docker.io", "library/alpine", "latest", None),
        ("docker.io/library/alpine:3", "docker.io", "library/alpine", "3", None),
        ("localhost/app", "localhost", "app", "latest", None),
        ("localhost:5000/app:1", "localhost:5000", "app", "1", None),
        ("quay.io/a/b/c:v1.2-rc", "quay.io", "a/b/c", "v1.2-rc", None),
        ("[::1]:5000/app", "[::1]:5000", "app", "latest", None),
        (f"app@sha256:{HEX}", "docker.io", "library/app", None, f"sha256:{HEX}"),
        (f"r.io/app:1@sha256:{HEX}", "r.io", "app", "1", f"sha256:{HEX}"),
        ("MyHost/app", "MyHost", "app", "latest", None),
    ],
)
def test_reference(text: str, registry: str, repository: str, tag: str | None, digest: str | None) -> None:
    ref = ImageReference.parse(text)
    assert (ref.registry, ref.repository, ref.tag, ref.digest) == (registry, repository, tag, digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "UPPER",
        "a//b",
        "a/../b",
        "a.b/../../etc",
        "app:",
        "app:bad tag",
        "app@sha256:12",
        f"app@md5:{HEX}",
        "r.io:99999/a",
        "r.io:0/a",
        "r.io/",
        "-r.io/a",
        "a?b",
        "r.io/a#b",
        "http://r.io/a",
        "x" * 300,
    ],
)
def test_bad_reference(text: str) -> None:
    with pytest.raises(FormatError):
        ImageReference.parse(text)


def descriptor(architecture: str | None = None, variant: str | None = None, **more: object) -> dict[str, object]:
    fields: dict[str, object] = {"mediaType": OCI_MANIFEST, "digest": f"sha256:{HEX}", "size": 5, **more}
    if architecture:
        fields["platform"] = {"os": "linux", "architecture": architecture} | ({"variant": variant} if variant else {})
    return fields


def test_manifest_kinds() -> None:
    body = {"schemaVersion": 2, "config": descriptor(), "layers": [descriptor(annotations={"a": "b"}, urls=["https://x"])]}
    manifest = parse_manifest(json.dumps(body).encode(), f"{DOCKER_MANIFEST}; charset=utf-8")
    assert isinstance(manifest, Manifest)
    assert manifest.media_type == DOCKER_MANIFEST
    assert manifest.layers[0].annotations == {"a": "b"}
    assert manifest.layers[0].urls == ("https://x",)
    index = parse_manifest(json.dumps({"mediaType": DOCKER_LIST, "manifests": [descriptor("amd64")]}).encode())
    assert isinstance(index, ImageIndex)
    assert index.media_type == DOCKER_LIST
    assert parse_manifest(json.dumps(body).encode(), "text/plain").media_type == OCI_MANIFEST


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "not a JSON object"),
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
        ({"manifests": [], "layers": []}, "at once"),
        ({}, "neither"),
        ({"layers": []}, "neither"),
        ({"config": {}, "layers": []}, "size"),
        ({"config": {"size": True, "digest": "x"}, "layers": []}, "size"),
        ({"config": {"size": -1, "digest": "x"}, "layers": []}, "size"),
        ({"config": {"size": 1, "digest": 5}, "layers": []}, "digest"),
        ({"config": {"size": 1, "digest": "sha256:abc"}, "layers": []}, "digest"),
        ({"manifests": "abc"}, "not a list"),
        ({"manifests": [descriptor()] * 4097}, "limit"),
        ({"manifests": [descriptor(platform=5)]}, "platform"),
        ({"manifests": [descriptor(platform={})]}, "platform"),
        ({"manifests": [descriptor(urls=5)]}, "urls"),
        ({"manifests": [descriptor(annotations=[1])]}, "annotations"),
        ({"mediaType": 5, "manifests": []}, "mediaType"),
    ],
)
def test_bad_manifest(document: object, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        parse_manifest(json.dumps(document).encode(), OCI_INDEX)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, b" " * (5 << 20)])
def test_manifest_that_is_no_json(raw: bytes) -> None:
    with pytest.raises(FormatError):
        parse_manifest(raw)


@pytest.mark.parametrize(
    ("wanted", "offered", "chosen"),
    [
        (("amd64", None), [("arm64", None), ("amd64", None)], 1),
        (("amd64", None), [("amd64", "v3"), ("amd64", "v1")], 1),
        (("amd64", "v3"), [("amd64", None), ("amd64", "v2")], 1),
        (("arm64", None), [("arm64", "v8")], 0),
        (("arm64", "v8"), [("arm64", None)], 0),
        (("arm", "v7"), [("arm", "v6"), ("arm", "v5"), ("arm", "v7")], 2),
        (("arm", "v6"), [("arm", "v7"), ("arm", "v5")], 1),
        (("amd64", None), [("unknown", None), ("amd64", None)], 1),
        (("amd64", None), [(None, None), ("amd64", None)], 1),
        (("amd64", None), [(None, None)], 0),
        (("s390x", None), [("arm", "v7")], None),
    ],
)
def test_platform(wanted: tuple[str, str | None], offered: list[tuple[str | None, str | None]], chosen: int | None) -> None:
    entries = [descriptor(*entry, annotations={"n": str(at)}) for at, entry in enumerate(offered)]
    index = parse_manifest(json.dumps({"manifests": entries}).encode())
    assert isinstance(index, ImageIndex)
    if chosen is None:
        with pytest.raises(FormatError, match="linux/arm/v7"):
            index.choose(Platform("linux", *wanted))
    else:
        assert index.choose(Platform("linux", *wanted)).annotations["n"] == str(chosen)


def test_challenges_of_real_registries() -> None:
    hub = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/a:pull"'
    (found,) = parse_challenges([hub])
    assert found.scheme == "bearer"
    assert found.params["scope"] == "repository:library/a:pull"
    schemes = [
        one.scheme
        for one in parse_challenges(['Basic realm="a, b", Bearer realm=x,error="insufficient_scope"', "Negotiate abc=="])
    ]
    assert schemes == ["basic", "bearer", "negotiate"]
    assert [one.scheme for one in parse_challenges(["Basic, Digest"])] == ["basic", "digest"]


def test_docker_config() -> None:
    raw = {
        "auths": {
            "https://index.docker.io/v1/": {"auth": "dTpwOnE="},
            "quay.io/team": {"username": "a", "password": "b"},
            "r.io": {"identitytoken": "t"},
            "empty.io": {},
            "broken.io": {"auth": "###"},
        },
        "credHelpers": {"ecr.aws": "ecr-login", "bad.io": "../../bin/sh"},
        "credsStore": "desktop",
    }
    config = parse_docker_config(json.dumps(raw).encode())
    assert config.auths == {
        "docker.io": Credentials("u", "p:q"),
        "quay.io/team": Credentials("a", "b"),
        "r.io": Credentials("", "", "t"),
    }
    assert config.helpers == {"ecr.aws": "ecr-login"}
    assert config.store == "desktop"
    assert "p:q" not in repr(config)
    assert "'t'" not in repr(config)
    assert config_key("registry-1.docker.io") == "docker.io"
    assert config_key("http://r:5000/v2/") == "r:5000"
    assert parse_helper_answer(b'{"Username": "<token>", "Secret": "s"}') == Credentials("", "", "s")
    assert parse_helper_answer(b'{"Username": "u", "Secret": "s"}') == Credentials("u", "s")
    assert parse_helper_answer(b'{"Username": "u"}') is None


def test_default_hosts() -> None:
    assert default_host("docker.io").base_url == "https://registry-1.docker.io/v2"
    assert default_host("quay.io").base_url == "https://quay.io/v2"
    assert default_host("localhost:5000").base_url == "http://localhost:5000/v2"
    assert default_host("localhost:443").base_url == "https://localhost:443/v2"
    assert default_host("10.0.0.1:5000").base_url == "https://10.0.0.1:5000/v2"
    assert default_host("10.0.0.1:5000", {"10.0.0.1"}).base_url == "http://10.0.0.1:5000/v2"
    assert default_host("10.0.0.1:5000", {"10.0.0.1:5000"}).is_plain
    loopback = ["localhost", "127.0.0.1:80", "127.9.9.9", "[::1]:5000", "::1", "a.localhost:1"]
    assert all(map(is_loopback, loopback))
    assert not any(map(is_loopback, ["10.0.0.1", "localhost.com", "[::2]:1", "128.0.0.1"]))


HOSTS_TOML = """
server = "https://registry.example"
ca = "own.pem"

[host."https://mirror.example/prefix"]
  capabilities = ["pull", "resolve"]
  ca = ["/etc/a.pem", "b.pem"]
  client = [["c.pem", "c.key"], "both.pem"]
  skip_verify = true
  dial_timeout = "1500ms"
  [host."https://mirror.example/prefix".header]
    x-one = "1"
    x-two = ["2", "3"]

[host."http://10.0.0.9:5000/v2/proxy"]
  override_path = true
  capabilities = ["pull"]
"""


def test_hosts_toml() -> None:
    first, second, own = parse_hosts(HOSTS_TOML, "registry.example", Path("/certs"))
    assert first.base_url == "https://mirror.example/prefix/v2"
    assert first.is_mirror
    assert first.capabilities == {"pull", "resolve"}
    assert first.tls.skip_verify
    assert first.connect_timeout_s == 1.5
    assert first.tls.ca_paths == (Path("/etc/a.pem"), Path("/certs/b.pem"))
    assert first.tls.client_pairs == ((Path("/certs/c.pem"), Path("/certs/c.key")), (Path("/certs/both.pem"), None))
    assert first.headers == (("x-one", "1"), ("x-two", "2"), ("x-two", "3"))
    assert second.base_url == "http://10.0.0.9:5000/v2/proxy"
    assert second.capabilities == {"pull"}
    assert own.base_url == "https://registry.example/v2"
    assert not own.is_mirror
    assert own.tls.ca_paths == (Path("/certs/own.pem"),)


@pytest.mark.parametrize(
    "text",
    [
        "=",
        "host = 5",
        '[host."https://a"]\ncapabilities = ["fly"]',
        '[host."https://a"]\ncapabilities = 5',
        '[host."ftp://a"]',
        '[host."https://u:p@a"]',
        '[host."https://a"]\nca = 5',
        '[host."https://a"]\nclient = 5',
        '[host."https://a"]\nclient = [["a", "b", "c"]]',
        '[host."https://a"]\ndial_timeout = "soon"',
        '[host."https://a"]\n[host."https://a".header]\nx = 5',
        '[host."https://a"]\n[host."https://a".header]\n"x y" = "5"',
        '[host."https://a"]\n[host."https://a".header]\nx = "a\\r\\nb"',
        "server = 5",
        '[host]\n"https://a" = 5',
    ],
)
def test_bad_hosts_toml(text: str) -> None:
    with pytest.raises(SettingsError, match=r"/certs/hosts\.toml"):
        parse_hosts(text, "r.io", Path("/certs"))


def test_directories_are_tried_in_order(tmp_path: Path) -> None:
    assert [path.name for path in host_directories(tmp_path, "r.io:5000")] == ["r.io_5000_", "r.io:5000", "_default"]
    assert load_hosts(tmp_path, "r.io")[0] == (default_host("r.io"),)
    assert load_hosts(None, "r.io")[0] == (default_host("r.io"),)
    (tmp_path / "_default").mkdir()
    (tmp_path / "_default" / "hosts.toml").write_text('[host."http://mirror:5000"]')
    hosts, trouble = load_hosts(tmp_path, "r.io")
    assert [host.base_url for host in hosts] == ["http://mirror:5000/v2", "https://r.io/v2"]
    assert not trouble
    (tmp_path / "r.io").mkdir()
    assert [host.base_url for host in load_hosts(tmp_path, "r.io")[0]] == ["https://r.io/v2"]
    for name in ("ca.crt", "us.cert", "us.key", "other.cert"):
        (tmp_path / "r.io" / name).touch()
    (tmp_path / "r.io" / "hosts.toml").write_text("broken")
    hosts, trouble = load_hosts(tmp_path, "r.io")
    assert "not TOML" in trouble
    assert hosts[0].tls.ca_paths == (tmp_path / "r.io" / "ca.crt",)
    assert hosts[0].tls.client_pairs == (
        (tmp_path / "r.io" / "other.cert", None),
        (tmp_path / "r.io" / "us.cert", tmp_path / "r.io" / "us.key"),
    )
    (tmp_path / "r.io" / "hosts.toml").write_text("#" * (2 << 20))
    assert "larger" in load_hosts(tmp_path, "r.io")[1]


def test_redirects() -> None:
    assert next_hop("https://r/v2/a/blobs/x", "/other") == "https://r/other"
    assert next_hop("http://r/v2", "https://s/x?sig=a%2Fb&c=~!*'()+,;%20#f") == "https://s/x?sig=a%2Fb&c=~!*'()+,;%20"
    for location in [None, "", "http://s/x", "ftp://s/x", "https://u:p@s/x", "https://s/\nx", "https://[/x", "https://s:x/"]:
        with pytest.raises(BadRedirect):
            next_hop("https://r/v2/a", location)


def test_signed_url_expiry() -> None:
    now = 1_700_000_000.0
    day = datetime(2023, 11, 14, 22, 0, 0, tzinfo=UTC).timestamp()
    assert url_expiry("https://s/x?X-Amz-Date=20231114T220000Z&X-Amz-Expires=1200&X-Amz-Signature=q", now) == day + 1200
    assert url_expiry("https://s/x?X-Goog-Date=20231114T220000Z&X-Goog-Expires=60", now) == day + 60
    assert url_expiry("https://s/x?Expires=1700000600&Signature=q", now) == 1_700_000_600
    assert url_expiry("https://s/x?se=2023-11-14T22%3A00%3A00Z&sig=q", now) == day
    for url in [
        "https://s/x",
        "https://s/x?X-Amz-Date=today&X-Amz-Expires=5",
        "https://s/x?se=never&sig=q",
        "https://s/?Expires=soon",
    ]:
        assert url_expiry(url, now) == now + 300
    kept = SignedUrl.of("https://s/x?Expires=99999999999&Signature=secret", now)
    assert kept.expires_at <= now + 3600
    assert "secret" not in repr(kept)


def test_retry_after() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert parse_retry_after("7", now) == 7
    assert parse_retry_after("Thu, 01 Jan 2026 00:00:30 GMT", now) == 30
    assert parse_retry_after("Wed, 31 Dec 2025 00:00:30 GMT", now) == 0
    for text in (None, "", "soon", "-5", "²"):
        assert parse_retry_after(text, now) is None
    assert [round(backoff_s(attempt, 0.5), 3) for attempt in range(8)] == [0.075, 0.15, 0.3, 0.6, 1.2, 2.4, 3.0, 3.0]


@pytest.mark.parametrize(
    "body",
    [
        b"--b\r\n\r\nxxxx",
        b"--b\r\nContent-Range: bytes 0-3/11\r\n\r\nxxxx\r\n--b--",
        b"--b\r\nContent-Range: bytes 0-10/10\r\n\r\nxxxx",
        b"--b\r\nContent-Range: bytes 0-3/10\r\n\r\nxxxxx\r\n--b--",
        b"--b text\r\n",
        b"--b" + b" " * 9000,
        b"--b\r\n" + b"x" * 9000,
        b"x" * 70_000,
        b"--b\r\nContent-Range: bytes 0-0/10\r\n\r\nx\r\n" * 5000,
    ],
)
def test_bad_multipart(body: bytes) -> None:
    with pytest.raises(RangeMismatch):
        MultipartParser(b"b", 10).feed(body)


def test_boundaries() -> None:
    assert boundary_of('multipart/byteranges; boundary="a \\" b"') == b'a " b'
    assert boundary_of("multipart/byteranges;charset=x; BOUNDARY = abc; x=y") == b"abc"
    for text in ("multipart/byteranges", "multipart/byteranges; boundary=" + "x" * 71, "multipart/byteranges; boundary=é"):
        with pytest.raises(RangeMismatch):
            boundary_of(text)


def test_digest_helper_agrees() -> None:
    assert digest_of(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
