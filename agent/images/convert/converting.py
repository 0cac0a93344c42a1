"""The conversion itself: documents from the top down, layers through the writer, results from the bottom up.

Each layer is three files at most, one after the other, in a scratch folder: its blob, its tar, the new blob. Threads do the work,
one for each processor, and few layers are under way at once, so that memory and disk are bounded by the largest layers, not by the
image. A layer or blob that several platforms share is done once.

Nothing that the result is made of depends on when, where or in what order this ran.
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import trio

from agent.formats.model import Digest, FormatError, digest_of
from agent.images.convert.documents import (
    MAX_CONFIG_BYTES,
    NYDUS_ARTIFACT,
    OCI_LAYER,
    Json,
    Kind,
    LayerKind,
    NewLayer,
    converted_descriptor,
    descriptor_of,
    diff_ids_of,
    is_wanted,
    kind_of,
    layer_kind,
    parse_image,
    parse_json,
    platform_of,
    rewrite_config,
    rewrite_index,
    rewrite_manifest,
    to_oci,
)
from agent.images.convert.places import Document, Source, Target, Tick
from agent.images.convert.unpacking import unpack, verify
from agent.images.convert.writers import ImageWriter, Written
from agent.registry import Descriptor, ImageIndex, Manifest, Platform, parse_manifest
from agent.registry.manifests import INDEX_TYPES, MANIFEST_TYPES

_MAX_NESTING: Final = 3
_IMAGES_AT_ONCE: Final = 2
"""Of one index. A manifest may be 4 MiB, its parsed form several times that, and an index may name thousands."""
_EXTRA_LAYERS: Final = 2
"""Layers under way beside those that threads work on: being fetched or pushed."""
_MAX_WARNINGS: Final = 20
"""Of one layer; a hostile one may have millions."""

Event = dict[str, Any]
Progress = Callable[[Event], None]
_Made = TypeVar("_Made")


@attrs.frozen
class Wish:
    """What the user asked for."""

    platforms: tuple[Platform, ...] = ()
    """None means all."""
    prioritized: tuple[str, ...] = ()
    is_forced: bool = False
    """Layers that are in the format already are written again. So they are where a prefetch list asks for another order."""


@attrs.frozen
class Report:
    """What was done."""

    root: Document
    images: tuple[str, ...]
    converted: int
    kept: int
    source_bytes: int
    target_bytes: int
    notes: tuple[str, ...]


@attrs.define
class _Once:
    """One result that several may wait for."""

    done: trio.Event = attrs.field(factory=trio.Event)
    value: Any = None


@attrs.define
class Conversion:
    """One run; see the module's text."""

    _source: Source
    _target: Target
    _writer: ImageWriter
    _wish: Wish
    _scratch: Path
    _progress: Progress = lambda _event: None
    _notes: dict[str, None] = attrs.field(factory=dict)
    _images: list[str] = attrs.field(factory=list)
    _once: dict[tuple[str, ...], _Once] = attrs.field(factory=dict)
    _missing: list[frozenset[str]] = attrs.field(factory=list)
    _converted: set[str] = attrs.field(factory=set)
    _kept: set[str] = attrs.field(factory=set)
    _sizes: list[tuple[int, int]] = attrs.field(factory=list)
    _names: int = 0
    _processors: int = attrs.field(factory=lambda: len(os.sched_getaffinity(0)))
    _threads: trio.CapacityLimiter = attrs.field(init=False)
    _under_way: trio.CapacityLimiter = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._threads = trio.CapacityLimiter(self._processors)
        self._under_way = trio.CapacityLimiter(self._layers_at_once)

    @property
    def _layers_at_once(self) -> int:
        return self._processors + _EXTRA_LAYERS

    async def run(self) -> Report:
        """Convert.

        Raises:
            FormatError: the source is not what it should be, or the format cannot express it.
            ShoalError: a place failed.
        """
        root = await self._source.read_root()
        # A target that is away or refuses should say so before the work, not after it.
        await self._target.has_blob(root.digest)
        made = await self._document(root, None, 0)
        if made is None or not self._images:
            wanted = ", ".join(map(str, self._wish.platforms))
            raise FormatError(f"the source has no image to convert{' for ' + wanted if wanted else ''}" + self._why())
        await self._target.put_root(made)
        self._note_missing()
        return Report(
            made,
            tuple(sorted(self._images)),
            len(self._converted),
            len(self._kept),
            sum(old for old, _ in self._sizes),
            sum(new for _, new in self._sizes),
            tuple(self._notes),
        )

    def _why(self) -> str:
        return f" ({'; '.join(self._notes)})" if self._notes else ""

    def _note(self, text: str) -> None:
        self._notes.setdefault(text)

    def _note_missing(self) -> None:
        """Paths that no converted layer has."""
        if self._wish.prioritized and self._missing:
            nowhere = frozenset.intersection(*self._missing)
            if nowhere:
                named = [path for path in self._wish.prioritized if path in nowhere]
                shown = ", ".join(path.encode("utf-8", "replace").decode() for path in named[:5])
                more = f" and {len(named) - 5} more" if len(named) > 5 else ""
                self._note(f"{len(named)} of {len(self._wish.prioritized)} prefetch paths are in no layer: {shown}{more}")

    # --- documents --------------------------------------------------------------------------------------------------------

    async def _document(self, document: Document, entry: Json | None, depth: int) -> Document | None:
        """The document converted, everything below it in the target already; None if nothing of it is wanted."""
        parsed = parse_manifest(document.raw, document.media_type)
        if isinstance(parsed, Manifest):
            return await self._manifest(document, parsed, entry)
        if depth >= _MAX_NESTING:
            raise FormatError(f"more than {_MAX_NESTING} image indexes within one another")
        return await self._index(document, parsed, depth)

    async def _index(self, document: Document, parsed: ImageIndex, depth: int) -> Document | None:
        raw = parse_json(document.raw, "image index")
        made: list[Json | None] = [None] * len(parsed.manifests)

        async def convert(at: int) -> None:
            made[at] = await self._entry(raw["manifests"][at], parsed.manifests[at], depth)

        await _all_of([partial(convert, at) for at in range(len(made))], 1 if depth else _IMAGES_AT_ONCE)
        entries = [entry for entry in made if entry is not None]
        if not entries:
            return None
        if entries == raw["manifests"]:
            return document
        media_type = to_oci(parsed.media_type) if self._writer.needs_oci else parsed.media_type
        body = rewrite_index(raw, media_type, entries)
        return Document(digest_of(body), media_type, body)

    async def _entry(self, raw: Json, entry: Descriptor, depth: int) -> Json | None:
        """One line of an index, as it becomes; None if it is left out."""
        if entry.platform is not None and entry.platform.os != "unknown" and not is_wanted(entry.platform, self._wish.platforms):
            return None
        if entry.media_type not in (*MANIFEST_TYPES, *INDEX_TYPES):
            self._note(f"left out: {entry.digest} is a {entry.media_type[:100] or 'thing without a media type'}, not an image")
            return None
        document = await self._source.read_document(entry.digest, entry.size, entry.media_type)
        if document is None:
            self._note(f"left out: the source does not have the image for {entry.platform or 'an unknown platform'}")
            return None
        made = await self._document(document, raw, depth + 1)
        if made is None:
            return None
        await self._target.put_document(made)
        if made.digest == entry.digest:
            return raw
        new = {key: value for key, value in raw.items() if key != "data"}
        new |= {"mediaType": made.media_type, "digest": made.digest, "size": len(made.raw)}
        return new | ({"artifactType": NYDUS_ARTIFACT} if self._writer.name == "nydus" else {})

    async def _manifest(self, document: Document, parsed: Manifest, entry: Json | None) -> Document | None:
        raw = parse_json(document.raw, "manifest")
        kind = kind_of(parsed, raw, entry)
        if kind in (Kind.ATTESTATION, Kind.SOCI):
            what = "attestation of" if kind is Kind.ATTESTATION else "SOCI index for"
            self._note(
                f"left out: {document.digest} is an {what} what was converted, and holds no longer".replace("an SOCI", "a SOCI")
            )
            return None
        if kind is Kind.NYDUS and entry is None and self._writer.name != "nydus":
            raise FormatError("the source is a nydus image; convert from the image that it was made from")
        if kind is Kind.ARTIFACT and entry is None:
            raise FormatError(f"the source is no container image: its config is a {parsed.config.media_type[:100]}")
        if kind is not Kind.IMAGE:
            return await self._copy(document, parsed, kind, entry)
        return await self._image(document)

    async def _copy(self, document: Document, parsed: Manifest, kind: Kind, entry: Json | None) -> Document:
        """What is no image, or is in the format already, goes along as it is."""
        if kind is Kind.NYDUS and self._writer.name == "nydus":
            self._images.append(_name_of(entry))
            self._kept.update(layer.digest for layer in parsed.layers)
        else:
            self._note(f"not converted: {document.digest} is {'a nydus image' if kind is Kind.NYDUS else 'no container image'}")
        for blob in (parsed.config, *parsed.layers):
            if layer_kind(blob.media_type) is not LayerKind.FOREIGN:
                await self._copy_blob(blob)
        return document

    async def _image(self, document: Document) -> Document | None:
        parsed, raw = parse_image(document.raw, document.media_type)
        old_config = await self._source.read_small(parsed.config.digest, parsed.config.size, MAX_CONFIG_BYTES)
        config = parse_json(old_config, "image config")
        if not is_wanted(platform_of(config), self._wish.platforms):
            return None
        diff_ids = diff_ids_of(config, len(parsed.layers))
        made: list[tuple[NewLayer | None, Written | None]] = [(None, None)] * len(diff_ids)

        async def convert(at: int) -> None:
            made[at] = await self._layer(parsed.layers[at], raw["layers"][at], diff_ids[at])

        await _all_of([partial(convert, at) for at in range(len(diff_ids))], self._layers_at_once)
        # A format in which layers are nothing but data has each blob once, and none for a layer without.
        is_data = self._writer.name == "nydus"
        layers, dropped = [], set()
        for at, (layer, _) in enumerate(made):
            if layer is None or (is_data and layer in layers):
                dropped.add(at)
            else:
                layers.append(layer)
        self._images.append(str(platform_of(config)))
        if not dropped and [layer.descriptor for layer in layers] == raw["layers"]:
            await self._copy_blob(parsed.config)
            return document
        last = await self._last([written for _, written in made if written is not None])
        step = None
        if last is not None:
            layers.append(last)
            step = {"created_by": f"shoal convert --to {self._writer.name}", "comment": "bootstrap layer"}
        new_config = rewrite_config(config, [layer.diff_id for layer in layers], dropped, step)
        if not await self._target.has_blob(digest_of(new_config)):
            await self._target.put_blob(digest_of(new_config), len(new_config), new_config)
        fit = to_oci if self._writer.needs_oci else str
        descriptor = {key: value for key, value in raw["config"].items() if key != "data"}
        descriptor |= descriptor_of(fit(parsed.config.media_type), new_config)
        body = rewrite_manifest(raw, fit(parsed.media_type), descriptor, layers, self._writer.manifest_annotations)
        return Document(digest_of(body), fit(parsed.media_type), body)

    # --- layers -----------------------------------------------------------------------------------------------------------

    async def _layer(self, layer: Descriptor, raw: Json, diff_id: Digest) -> tuple[NewLayer | None, Written | None]:
        """The layer as it becomes, None if it needs no blob; and what was written, if it was."""
        kind = layer_kind(layer.media_type)
        if kind is LayerKind.FOREIGN:
            return await self._foreign(layer, raw, diff_id), None
        if kind is not LayerKind.TAR:
            raise FormatError(f"layer {layer.digest} is a {layer.media_type[:100]!r}, which is no layer that can be converted")
        if await self._is_kept(layer):
            await self._copy_blob(layer)
            self._kept.add(layer.digest)
            fit = to_oci(layer.media_type) if self._writer.needs_oci else layer.media_type
            return NewLayer(raw if fit == layer.media_type else raw | {"mediaType": fit}, diff_id), None
        written: Written = await self._only_once((layer.digest, diff_id), partial(self._convert, layer, diff_id))
        if written.digest is None or written.diff_id is None:
            return None, written
        descriptor = converted_descriptor(
            raw, self._writer.media_type(layer.media_type), written.digest, written.size, written.annotations
        )
        return NewLayer(descriptor, written.diff_id), written

    async def _foreign(self, layer: Descriptor, raw: Json, diff_id: Digest) -> NewLayer:
        """Layers that must not be distributed stay where they are."""
        if self._writer.name == "nydus":
            raise FormatError(f"layer {layer.digest} must not be distributed, and nydus would need its files")
        if layer.urls:
            self._note(f"not converted: layer {layer.digest} must not be distributed; it stays at {layer.urls[0][:200]}")
        else:
            self._note(f"not converted: layer {layer.digest} must not be distributed")
            await self._copy_blob(layer)
        return NewLayer(raw, diff_id)

    async def _is_kept(self, layer: Descriptor) -> bool:
        if self._wish.is_forced or self._wish.prioritized:
            return False
        if not self._writer.may_be_written(layer.media_type, layer.annotations):
            return False
        return self._writer.is_written(await self._source.read_tail(layer.digest, layer.size, self._writer.tail_bytes))

    async def _convert(self, layer: Descriptor, diff_id: Digest) -> Written:
        what = layer.digest[7:19]
        async with self._under_way:
            blob, tar, new = (self._file(kind) for kind in ("blob", "tar", "new"))
            try:
                fetched = await self._source.fetch(layer.digest, layer.size, blob, self._ticker(what, "fetching", layer.size))
                tick = self._ticker(what, "unpacking", layer.size)
                size: int = await self._in_thread(unpack, fetched, layer.digest, tar, diff_id, tick)
                blob.unlink(missing_ok=True)
                tick = self._ticker(what, "converting", 2 * size)
                written: Written = await self._in_thread(self._write, layer.digest, tar, new, tick)
                tar.unlink()
                await self._put(written.digest, written.size, new, what)
            finally:
                for path in (blob, tar, new):
                    path.unlink(missing_ok=True)
        self._converted.add(layer.digest)
        self._missing.append(frozenset(written.missing))
        self._warn(written)
        self._sizes.append((layer.size, written.size))
        return written

    def _write(self, digest: Digest, tar: Path, new: Path, tick: Tick) -> Written:
        with tar.open("rb", buffering=0) as source, new.open("wb") as output:
            try:
                return self._writer.write_layer(_Watched(source, tick), output, self._wish.prioritized)  # type: ignore[arg-type]
            except FormatError as exc:
                raise FormatError(f"layer {digest}: {exc}") from exc

    async def _last(self, layers: Sequence[Written]) -> NewLayer | None:
        new = self._file("last")

        def write() -> Written | None:
            with new.open("wb") as output:
                return self._writer.write_last(layers, output, self._wish.prioritized)

        try:
            written: Written | None = await self._in_thread(write)
            if written is None or written.digest is None or written.diff_id is None:
                return None
            await self._put(written.digest, written.size, new, "bootstrap")
        finally:
            new.unlink(missing_ok=True)
        descriptor = {"mediaType": f"{OCI_LAYER}+gzip", "digest": written.digest, "size": written.size}
        self._warn(written)
        return NewLayer(descriptor | {"annotations": dict(written.annotations)}, written.diff_id)

    async def _put(self, digest: Digest | None, size: int, path: Path, what: str) -> None:
        self._progress({"what": what, "done": 0, "total": size, "state": "pushing"})
        if digest is not None and not await self._target.has_blob(digest):
            await self._target.put_blob(digest, size, path)
        self._progress({"what": what, "done": size, "total": size, "state": "done"})

    def _warn(self, written: Written) -> None:
        for text in written.warnings[:_MAX_WARNINGS]:
            self._note(text)

    async def _copy_blob(self, blob: Descriptor) -> None:
        await self._only_once((blob.digest,), partial(self._copy_once, blob))

    async def _copy_once(self, blob: Descriptor) -> None:
        if await self._target.has_blob(blob.digest):
            return
        what = blob.digest[7:19]
        async with self._under_way:
            path = self._file("copy")
            try:
                fetched = await self._source.fetch(blob.digest, blob.size, path, self._ticker(what, "fetching", blob.size))
                await self._in_thread(verify, fetched, blob.digest, self._ticker(what, "checking", blob.size))
                await self._target.put_blob(blob.digest, blob.size, fetched)
            finally:
                path.unlink(missing_ok=True)
        self._progress({"what": what, "done": blob.size, "total": blob.size, "state": "copied"})

    # --- helpers ----------------------------------------------------------------------------------------------------------

    async def _only_once(self, key: tuple[str, ...], make: Callable[[], Awaitable[_Made]]) -> _Made:
        """The result of the first who asked. If that one fails, everything ends, so nobody waits in vain."""
        known = self._once.get(key)
        if known is not None:
            await known.done.wait()
            found: _Made = known.value
            return found
        slot = self._once[key] = _Once()
        made = await make()
        slot.value = made
        slot.done.set()
        return made

    def _file(self, kind: str) -> Path:
        self._names += 1
        return self._scratch / f"{self._names}.{kind}"

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await trio.to_thread.run_sync(work, *args, limiter=self._threads)

    def _ticker(self, what: str, state: str, total: int) -> Tick:
        done = 0
        self._progress({"what": what, "done": 0, "total": total, "state": state})

        def tick(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            if before >> 20 != done >> 20:
                self._progress({"what": what, "done": min(done, total), "total": total, "state": state})

        return tick


class _Watched:
    """A tar that tells how far it was read, and ends the reader's thread when the conversion was given up."""

    def __init__(self, file: Any, tick: Tick) -> None:
        self._file, self._tick = file, tick
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        trio.from_thread.check_cancelled()
        data: bytes = self._file.read(count)
        self._tick(len(data))
        return data


def _name_of(entry: Json | None) -> str:
    platform = (entry or {}).get("platform") or {}
    return "/".join(filter(None, (platform.get(key) for key in ("os", "architecture", "variant")))) or "linux"


async def _all_of(tasks: Sequence[Callable[[], Awaitable[None]]], most: int) -> None:
    limiter = trio.CapacityLimiter(most)

    async def run(task: Callable[[], Awaitable[None]]) -> None:
        async with limiter:
            await task()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(run, task)
