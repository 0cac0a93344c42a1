"""Against Debian's docker-registry: push, resolve, ranges, authentication; counted in its own access log."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from agent.errors import SourceRefused
from agent.formats.model import Digest, digest_of
from agent.registry import OCI_INDEX, OCI_MANIFEST, ImageReference, Platform, RegistryClient, open_registry_client
from tests.registry_servers import PASSWORD, USER, RealRegistry, open_real_registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with open_real_registry(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with open_real_registry(tmp_path_factory.mktemp("private"), auth=True) as server:
        yield server


def manifest_of(config: bytes, layers: list[bytes]) -> bytes:
    def descriptor(media_type: str, data: bytes) -> dict[str, object]:
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", layer) for layer in layers],
        }
    ).encode()


async def push_image(client: RegistryClient, ref: ImageReference, layer: bytes) -> Digest:
    config = b'{"architecture": "amd64", "os": "linux"}'
    await client.push_blob(ref, config, digest_of(config))
    await client.push_blob(ref, layer, digest_of(layer))
    return await client.push_manifest(ref, manifest_of(config, [layer]), OCI_MANIFEST)


async def read(client: RegistryClient, ref: ImageReference, blob: bytes, ranges: list[tuple[int, int]]) -> bytes:
    """What came, at its place; checks that each byte came once and no other did."""
    data, seen = bytearray(len(blob)), 0
    async with client.fetch_ranges(ref, digest_of(blob), len(blob), ranges) as stream:
        async for offset, part in stream:
            assert 0 < len(part) <= 65536
            data[offset : offset + len(part)] = part
            seen += len(part)
    wanted = bytearray(len(blob))
    for start, stop in ranges:
        wanted[start:stop] = blob[start:stop]
    assert data == wanted
    assert seen == len({at for start, stop in ranges for at in range(start, stop)})
    return bytes(data)


async def test_push_resolve_and_read(registry: RealRegistry) -> None:
    layer = random.Random(1).randbytes(3_000_000)
    ref = ImageReference.parse(f"{registry.host}/team/app:1")
    with trio.fail_after(30):
        async with open_registry_client() as client:
            digest = await push_image(client, ref, layer)
            resolved = await client.resolve(ref)
            assert (resolved.digest, resolved.index_digest) == (digest, None)
            assert await client.fetch_small(ref, resolved.config, 1000) == b'{"architecture": "amd64", "os": "linux"}'
            assert await client.fetch_small(ref, resolved.layers[0], 4_000_000) == layer
            await read(client, ref, layer, [(0, len(layer))])
            await read(client, ref, layer, [(5, 6), (100_000, 300_001), (2_999_999, 3_000_000)])
            await read(client, ref, layer, [(at, at + 10) for at in range(0, 2_000_000, 20_000)])
            await read(client, ref, layer, [])
            by_digest = await client.resolve(ImageReference(ref.registry, ref.repository, None, digest))
            assert by_digest.raw == resolved.raw
            with pytest.raises(ValueError, match="not inside"):
                client.fetch_ranges(ref, digest_of(layer), len(layer), [(0, len(layer) + 1)])


async def test_index_chooses_a_platform(registry: RealRegistry) -> None:
    name = f"{registry.host}/multi"
    async with open_registry_client(platform=Platform("linux", "arm64", "v8")) as client:
        entries = []
        for architecture in ("amd64", "arm64"):
            ref = ImageReference.parse(f"{name}:{architecture}")
            digest = await push_image(client, ref, architecture.encode() * 100)
            raw = (await client.resolve(ref)).raw
            entries.append(
                {
                    "mediaType": OCI_MANIFEST,
                    "digest": digest,
                    "size": len(raw),
                    "platform": {"os": "linux", "architecture": architecture},
                }
            )
        index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
        ref = ImageReference.parse(name)
        index_digest = await client.push_manifest(ref, index, OCI_INDEX)
        resolved = await client.resolve(ref)
        assert (resolved.digest, resolved.index_digest, resolved.index_raw) == (entries[1]["digest"], index_digest, index)
        assert (await client.resolve(ref, Platform("linux", "amd64"))).digest == entries[0]["digest"]


async def test_a_pull_makes_the_fewest_requests(registry: RealRegistry) -> None:
    layer = os.urandom(500_000)
    ref = ImageReference.parse(f"{registry.host}/few:1")
    async with open_registry_client() as client:
        await push_image(client, ref, layer)
    async with open_registry_client() as client:
        before = len(registry.requests())
        resolved = await client.resolve(ref)
        await client.fetch_small(ref, resolved.config, 1000)
        await read(client, ref, layer, [(0, 100), (400_000, 500_000)])
    # the log line follows the answer; one more request makes sure that it is there
    async with open_registry_client() as client:
        await client.resolve(ref)
    asked = [line for line in registry.requests()[before:] if "/few/" in line]
    assert len(asked) in {3, 4}, asked
    assert not any("HEAD" in line for line in asked)


async def test_push_from_a_file_and_in_chunks(registry: RealRegistry, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(2_500_000)
    file = tmp_path / "blob"
    file.write_bytes(data)
    other = data[::-1]
    (tmp_path / "other").write_bytes(other)
    ref = ImageReference.parse(f"{registry.host}/pushed:1")
    async with open_registry_client() as client:
        assert await client.push_blob(ref, file) is True
        assert await client.push_blob(ref, file, digest_of(data)) is False
        assert await client.push_blob(ref, tmp_path / "other", digest_of(other), chunk_bytes=1_000_000) is True
        assert await client.push_blob(ref, b"", digest_of(b"")) is True
        await read(client, ref, data, [(0, len(data))])
        await read(client, ref, other, [(1_500_000, 2_400_000)])
        with pytest.raises(SourceRefused, match="DIGEST_INVALID"):
            await client.push_blob(ref, b"abc", digest_of(b"xyz"))


async def test_what_is_not_there(registry: RealRegistry) -> None:
    ref = ImageReference.parse(f"{registry.host}/nobody/home:1")
    async with open_registry_client() as client:
        with pytest.raises(SourceRefused, match=r"404 \(MANIFEST_UNKNOWN") as caught:
            await client.resolve(ref)
        assert (caught.value.status, caught.value.source) == (404, registry.host)
        with pytest.raises(SourceRefused, match=r"404 \(BLOB_UNKNOWN"):
            await read(client, ref, b"x", [(0, 1)])


async def test_password(private: RealRegistry) -> None:
    ref = ImageReference.parse(f"{private.host}/team/app:1")
    async with open_registry_client() as client:
        with pytest.raises(SourceRefused, match="wants a user and password"):
            await client.resolve(ref)
        client.add_credentials(private.host, USER, "wrong")
        with pytest.raises(SourceRefused, match="refused the credentials of user 'shoal'"):
            await client.resolve(ref)
        client.add_credentials(private.host, USER, PASSWORD)
        layer = os.urandom(200_000)
        await push_image(client, ref, layer)
        await read(client, ref, layer, [(1, 2), (100_000, 150_000)])
        assert "secret" not in repr(client)


async def test_password_from_a_docker_config(private: RealRegistry, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    ref = ImageReference.parse(f"{private.host}/from/file:1")
    async with open_registry_client(docker_config=config) as client:
        with pytest.raises(SourceRefused):
            await push_image(client, ref, b"layer")
        config.write_text(json.dumps({"auths": {private.host: {"auth": "c2hvYWw6c2VjcmV0"}}}))
        await push_image(client, ref, b"layer")


async def test_concurrent_layers_reuse_connections(registry: RealRegistry) -> None:
    layers = [random.Random(seed).randbytes(300_000) for seed in range(8)]
    ref = ImageReference.parse(f"{registry.host}/many:1")
    async with open_registry_client() as client:
        for layer in layers:
            await client.push_blob(ref, layer, digest_of(layer))
        async with trio.open_nursery() as nursery:
            for layer in layers:
                nursery.start_soon(read, client, ref, layer, [(0, 150_000), (200_000, 300_000)])
