"""An OCI image layout directory as source or target (image spec 1.1, image-layout.md)."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import attrs
import trio

from agent.formats.model import Digest, FormatError, digest_of, parse_digest
from agent.images.convert.documents import dump_json, parse_json
from agent.images.convert.places import Document, LayoutName, PlaceError, Tick
from agent.registry.manifests import MAX_MANIFEST_BYTES, OCI_INDEX, parse_manifest

REF_NAME: Final = "org.opencontainers.image.ref.name"
_VERSION: Final = b'{"imageLayoutVersion":"1.0.0"}'


@attrs.frozen
class LayoutPlace:
    """A directory, and an image in it."""

    name: LayoutName
    _disk: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(2), repr=False)

    async def read_root(self) -> Document:
        """See `Source`."""
        return await trio.to_thread.run_sync(self._read_root, limiter=self._disk)

    def _read_root(self) -> Document:
        if not (self.name.folder / "oci-layout").is_file():
            raise PlaceError(f"{self.name.folder} is no OCI image layout: it has no file oci-layout")
        index = parse_json(_read(self.name.folder / "index.json", MAX_MANIFEST_BYTES), "index.json")
        entries = index.get("manifests")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise FormatError(f"index.json of {self.name.folder} has no list of manifests")
        found = [entry for entry in entries if self._is_meant(entry)]
        if len({entry.get("digest") for entry in found}) != 1:
            there = ", ".join(sorted(filter(None, (_tag_of(entry) for entry in entries)))) or "no tags"
            problem = "more than one image" if found else f"no {self.name.tag or self.name.digest or 'image'}"
            raise PlaceError(f"{self.name.folder} has {problem}; name one as oci:DIRECTORY:TAG (there are: {there[:1000]})")
        raw = self._blob(parse_digest(str(found[0].get("digest"))), MAX_MANIFEST_BYTES)
        return Document(digest_of(raw), parse_manifest(raw, str(found[0].get("mediaType", ""))).media_type, raw)

    def _is_meant(self, entry: dict[str, Any]) -> bool:
        if self.name.digest is not None:
            return entry.get("digest") == self.name.digest
        return self.name.tag is None or _tag_of(entry) == self.name.tag

    async def read_document(self, digest: Digest, size: int, media_type: str) -> Document | None:
        """See `Source`."""
        if size > MAX_MANIFEST_BYTES:
            raise FormatError(f"manifest {digest} has {size} bytes; the limit is {MAX_MANIFEST_BYTES}")
        if not self._path(digest).exists():
            return None
        return Document(digest, media_type, await self.read_small(digest, size, MAX_MANIFEST_BYTES))

    async def read_small(self, digest: Digest, size: int, max_bytes: int) -> bytes:
        """See `Source`."""
        raw = await trio.to_thread.run_sync(partial(self._blob, digest, max_bytes), limiter=self._disk)
        if len(raw) != size:
            raise FormatError(f"blob {digest} has {len(raw)} bytes, and its descriptor says {size}")
        return raw

    def _blob(self, digest: Digest, max_bytes: int) -> bytes:
        raw = _read(self._path(digest), max_bytes)
        if digest_of(raw) != digest:
            raise PlaceError(f"{self._path(digest)} is damaged: its digest is another one")
        return raw

    async def read_tail(self, digest: Digest, size: int, count: int) -> bytes:
        """See `Source`."""
        with self._open(digest) as file:
            file.seek(max(0, size - count))
            return file.read(min(size, count))

    def _open(self, digest: Digest) -> BinaryIO:
        try:
            return self._path(digest).open("rb")
        except OSError as exc:
            raise PlaceError(f"cannot read blob {digest} of {self.name.folder}: {exc.strerror}") from exc

    async def fetch(self, digest: Digest, size: int, into: Path, tick: Tick) -> Path:
        """See `Source`."""
        del into
        with self._open(digest) as file:
            found = os.fstat(file.fileno()).st_size
        if found != size:
            raise FormatError(f"blob {digest} has {found} bytes, and its descriptor says {size}")
        tick(size)
        return self._path(digest)

    def _path(self, digest: Digest) -> Path:
        return self.name.folder / "blobs" / "sha256" / digest.removeprefix("sha256:")

    async def has_blob(self, digest: Digest) -> bool:
        """See `Target`."""
        return self._path(digest).exists()

    async def put_blob(self, digest: Digest, size: int, data: Path | bytes) -> None:
        """See `Target`."""
        del size
        await trio.to_thread.run_sync(self._put, self._path(digest), data, limiter=self._disk)

    def _put(self, path: Path, data: Path | bytes) -> None:
        """Write a file so that nobody sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
        try:
            with open(fd, "wb") as output:
                if isinstance(data, bytes):
                    output.write(data)
                else:
                    with data.open("rb") as source:
                        while block := source.read(1 << 20):
                            trio.from_thread.check_cancelled()
                            output.write(block)
                os.fchmod(output.fileno(), 0o644)
            Path(part).replace(path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

    async def put_document(self, document: Document) -> None:
        """See `Target`."""
        await trio.to_thread.run_sync(self._put, self._path(document.digest), document.raw, limiter=self._disk)

    async def put_root(self, document: Document) -> None:
        """See `Target`."""
        await self.put_document(document)
        await trio.to_thread.run_sync(self._name, document, limiter=self._disk)

    def _name(self, document: Document) -> None:
        entry: dict[str, Any] = {"mediaType": document.media_type, "digest": document.digest, "size": len(document.raw)}
        if self.name.tag is not None:
            entry["annotations"] = {REF_NAME: self.name.tag}
        path = self.name.folder / "index.json"
        if not (self.name.folder / "oci-layout").exists():
            self._put(self.name.folder / "oci-layout", _VERSION)
        with _locked(self.name.folder / "oci-layout"):
            index: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
            if path.exists():
                index = parse_json(_read(path, MAX_MANIFEST_BYTES), "index.json")
            others = [other for other in index.get("manifests", []) if _tag_of(other) != self.name.tag]
            index["manifests"] = [*others, entry]
            self._put(path, dump_json(index))

    def check_target(self) -> None:
        """Before any work: is this a layout, or can it become one?

        Raises:
            PlaceError: no.
        """
        folder = self.name.folder
        if folder.exists() and not (folder / "oci-layout").exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise PlaceError(f"{folder} exists and is no OCI image layout; name an empty or a new directory")


def _tag_of(entry: object) -> str | None:
    annotations = entry.get("annotations") if isinstance(entry, dict) else None
    tag = annotations.get(REF_NAME) if isinstance(annotations, dict) else None
    return tag if isinstance(tag, str) else None


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as exc:
        raise PlaceError(f"cannot read {path}: {exc.strerror}") from exc
    if len(raw) > max_bytes:
        raise FormatError(f"{path} has more than {max_bytes} bytes")
    return raw


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two conversions into one layout do not lose each other's entry."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
