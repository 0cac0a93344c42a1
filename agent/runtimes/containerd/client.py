"""containerd's client, as far as `shoal pull` needs it: bring an image in without unpacking any layer.

What containerd's own pull leaves behind is written here without its downloads: manifest, config and image index in the content
store with the labels that its garbage collector follows, one committed snapshot a layer, an image record. The snapshots are made
*through* containerd, which asks our snapshotter with the same labels that its clients send; so containerd's records and ours are
those of any other pull. A lease holds everything until the image record does.

Calls are grpcio futures whose completion wakes the trio task that waits; cancelling the task cancels the call.
"""

import datetime as dt
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar

import grpc
import structlog
import trio
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from agent.errors import ShoalError
from agent.registry import Descriptor, ImageReference, ResolvedManifest
from agent.runtimes.containerd.configuration import SNAPSHOTTER
from agent.runtimes.containerd.labels import SNAPSHOT_REF, layer_labels
from agent.runtimes.containerd.proto import (
    content_pb2,
    descriptor_pb2,
    images_pb2,
    introspection_pb2,
    leases_pb2,
    snapshots_pb2,
    version_pb2,
)

log = structlog.get_logger()

MAX_MESSAGE_BYTES: Final = 16 << 20
LEASE_S: Final = 3600
"""A lease that its pull left behind ends by itself; a pull of an hour is one that hangs."""

_SERVICES: Final = "containerd.services"
_GC_CONTENT: Final = "containerd.io/gc.ref.content"
_GC_SNAPSHOT: Final = "containerd.io/gc.ref.snapshot"

_Response = TypeVar("_Response", bound=Message)


REDIAL_S: Final = 10.0
REDIAL_STEP_S: Final = 0.2
OUR_SOCKET: Final = "while dialing"
"""What containerd says when the snapshotter behind a proxy plugin does not answer; another failure is not repeated."""


class ContainerdError(ShoalError):
    """containerd is away, is not set up for Shoal, or refused a request; `code` is the gRPC status where it answered."""

    def __init__(self, message: str, code: grpc.StatusCode | None = None) -> None:
        super().__init__(message)
        self.code = code


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The chain ID of each layer, bottom first (OCI image spec, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append("sha256:" + hashlib.sha256(f"{chain[-1]} {diff_id}".encode()).hexdigest() if chain else diff_id)
    return chain


class Containerd:
    """A connection to one containerd; made by `open_containerd`."""

    def __init__(self, channel: grpc.Channel, address: str) -> None:
        self._channel = channel
        self._address = address
        self._streams = trio.CapacityLimiter(4)

    async def version(self) -> str:
        """Its version as it says it. Raises ContainerdError."""
        answer = await self._call(f"{_SERVICES}.version.v1.Version/Version", Empty(), version_pb2.VersionResponse)
        return answer.version

    async def check_snapshotter(self, snapshotter: str = SNAPSHOTTER) -> None:
        """Make sure that containerd knows the snapshotter.

        Raises:
            ContainerdError: it does not, or could not start it; the text says what to do.
        """
        request = introspection_pb2.PluginsRequest(filters=[f"type==io.containerd.snapshotter.v1,id=={snapshotter}"])
        answer = await self._call(
            f"{_SERVICES}.introspection.v1.Introspection/Plugins", request, introspection_pb2.PluginsResponse
        )
        if not answer.plugins:
            raise ContainerdError(
                f"containerd at {self._address} has no snapshotter {snapshotter!r}: add the [proxy_plugins.{snapshotter}] section"
                " that `shoal doctor` prints to its config.toml and restart it"
            )
        if answer.plugins[0].init_err.code:
            raise ContainerdError(f"containerd could not start snapshotter {snapshotter!r}: {answer.plugins[0].init_err.message}")

    async def pull_image(
        self,
        namespace: str,
        ref: ImageReference,
        resolved: ResolvedManifest,
        config_raw: bytes,
        chain: Sequence[tuple[Descriptor, str]],
        progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
        *,
        snapshotter: str = SNAPSHOTTER,
    ) -> None:
        """Make the image appear in containerd as `str(ref)`, its layers (with their diff IDs, bottom first) served by us.

        `progress` gets the number of layers done and of all. Afterwards, also when cancelled, no lease is left; what was
        written without an image record is garbage that containerd collects.

        Raises:
            ContainerdError: containerd refused something, or a layer was not served (the agent's log says why).
        """
        lease = f"shoal-{secrets.token_hex(8)}"
        labels = {"containerd.io/gc.expire": rfc3339_in(LEASE_S)}
        await self.check_snapshotter(snapshotter)
        create = leases_pb2.CreateRequest(id=lease, labels=labels)
        await self._call(f"{_SERVICES}.leases.v1.Leases/Create", create, leases_pb2.CreateResponse, namespace)
        try:
            chain_id = chain_ids([diff_id for _, diff_id in chain])
            await together(
                lambda: self._write_contents(namespace, lease, ref, resolved, config_raw, chain_id, snapshotter),
                lambda: self._make_snapshots(namespace, lease, ref, resolved, chain, chain_id, progress, snapshotter),
            )
            await self._put_image(namespace, str(ref), resolved)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2), suppress(ContainerdError):
                await self._call(f"{_SERVICES}.leases.v1.Leases/Delete", leases_pb2.DeleteRequest(id=lease), Empty, namespace)

    async def _write_contents(
        self,
        namespace: str,
        lease: str,
        ref: ImageReference,
        resolved: ResolvedManifest,
        config_raw: bytes,
        chain_id: Sequence[str],
        snapshotter: str,
    ) -> None:
        source = {f"containerd.io/distribution.source.{ref.registry}": ref.repository}
        manifest_labels = {f"{_GC_CONTENT}.l.{at}": layer.digest for at, layer in enumerate(resolved.layers)}
        manifest_labels[f"{_GC_CONTENT}.config"] = resolved.config.digest
        config_labels = {f"{_GC_SNAPSHOT}.{snapshotter}": chain_id[-1]} if chain_id else {}
        blobs = [
            (resolved.config.digest, config_raw, source | config_labels),
            (resolved.digest, resolved.raw, source | manifest_labels),
        ]
        if resolved.index_digest is not None and resolved.index_raw is not None:
            manifests = json.loads(resolved.index_raw).get("manifests", [])
            index_labels = {f"{_GC_CONTENT}.m.{at}": entry["digest"] for at, entry in enumerate(manifests)}
            blobs.append((resolved.index_digest, resolved.index_raw, source | index_labels))
        await together(*(partial(self._write, namespace, lease, *blob) for blob in blobs))

    async def _write(self, namespace: str, lease: str, digest: str, data: bytes, labels: Mapping[str, str]) -> None:
        """Put one blob into the content store. One message carries data and commit; containerd answers it twice."""
        request = content_pb2.WriteContentRequest(
            action=content_pb2.WriteAction.COMMIT,
            ref=f"shoal-{secrets.token_hex(8)}",
            total=len(data),
            expected=digest,
            data=data,
            labels=labels,
        )
        try:
            await self._stream(
                f"{_SERVICES}.content.v1.Content/Write", request, content_pb2.WriteContentResponse, namespace, lease
            )
        except ContainerdError as exc:
            if exc.code is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            # Somebody else's, perhaps without what keeps the rest of our image alive.
            update = content_pb2.UpdateRequest(
                info=content_pb2.Info(digest=digest, labels=labels),
                update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
            )
            await self._call(f"{_SERVICES}.content.v1.Content/Update", update, content_pb2.UpdateResponse, namespace, lease)

    async def _make_snapshots(
        self,
        namespace: str,
        lease: str,
        ref: ImageReference,
        resolved: ResolvedManifest,
        chain: Sequence[tuple[Descriptor, str]],
        chain_id: Sequence[str],
        progress: Callable[[int, int], None],
        snapshotter: str,
    ) -> None:
        digests: list[str] = [layer.digest for layer, _ in chain]
        progress(0, len(chain))
        for at, (layer, _) in enumerate(chain):
            labels = layer_labels(str(ref), resolved.digest, digests, at, layer.annotations) | {SNAPSHOT_REF: chain_id[at]}
            parent = chain_id[at - 1] if at else ""
            await self._skip_layer(namespace, lease, snapshotter, chain_id[at], parent, labels)
            progress(at + 1, len(chain))
        if chain_id and not await self._has_snapshot(namespace, snapshotter, chain_id[-1]):
            raise ContainerdError(f"containerd lost the snapshots of {ref} while they were made; pull it again")

    async def _skip_layer(
        self, namespace: str, lease: str, snapshotter: str, chain_id: str, parent: str, labels: Mapping[str, str]
    ) -> None:
        """Prepare with the ref label; done if containerd answers that the layer exists already."""
        key = f"extract-{secrets.token_hex(8)} {chain_id}"
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent, labels=labels)
        service = f"{_SERVICES}.snapshots.v1.Snapshots"
        try:
            await self._call(f"{service}/Prepare", request, snapshots_pb2.PrepareSnapshotResponse, namespace, lease)
        except ContainerdError as exc:
            if exc.code is grpc.StatusCode.ALREADY_EXISTS:
                return
            raise
        remove = snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
        await self._call(f"{service}/Remove", remove, Empty, namespace, lease)
        raise ContainerdError(
            f"layer {labels.get('containerd.io/snapshot/cri.layer-digest')} could not be served; the agent's log says why"
        )

    async def _has_snapshot(self, namespace: str, snapshotter: str, chain_id: str) -> bool:
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=chain_id)
        try:
            await self._call(f"{_SERVICES}.snapshots.v1.Snapshots/Stat", request, snapshots_pb2.StatSnapshotResponse, namespace)
        except ContainerdError as exc:
            if exc.code is grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return True

    async def _put_image(self, namespace: str, name: str, resolved: ResolvedManifest) -> None:
        target = descriptor_pb2.Descriptor(media_type=resolved.media_type, digest=resolved.digest, size=len(resolved.raw))
        if resolved.index_digest is not None and resolved.index_raw is not None:
            target = descriptor_pb2.Descriptor(
                media_type=resolved.index_media_type or json.loads(resolved.index_raw).get("mediaType", ""),
                digest=resolved.index_digest,
                size=len(resolved.index_raw),
            )
        await self._put_record(namespace, images_pb2.Image(name=name, target=target))

    async def _put_record(self, namespace: str, image: images_pb2.Image) -> None:
        service = f"{_SERVICES}.images.v1.Images"
        try:
            await self._call(
                f"{service}/Create", images_pb2.CreateImageRequest(image=image), images_pb2.CreateImageResponse, namespace
            )
        except ContainerdError as exc:
            if exc.code is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            update = images_pb2.UpdateImageRequest(image=image, update_mask=FieldMask(paths=["target"]))
            await self._call(f"{service}/Update", update, images_pb2.UpdateImageResponse, namespace)

    async def _call(
        self, method: str, request: Message, response: type[_Response], namespace: str = "", lease: str = ""
    ) -> _Response:
        """One call. A containerd that started before us may still be waiting to dial our socket again, and says "unavailable"
        until it has (gRPC backs off up to 3 s): it is asked again for `REDIAL_S`."""
        give_up_at = trio.current_time() + REDIAL_S
        while True:
            try:
                return await self._call_once(method, request, response, namespace, lease)
            except ContainerdError as exc:
                is_redialling = exc.code is grpc.StatusCode.UNAVAILABLE and OUR_SOCKET in str(exc)
                if not is_redialling or trio.current_time() > give_up_at:
                    raise
                log.debug("containerd_not_yet_connected", reason=str(exc))
            await trio.sleep(REDIAL_STEP_S)

    async def _call_once(self, method: str, request: Message, response: type[_Response], namespace: str, lease: str) -> _Response:
        invoke = self._channel.unary_unary(f"/{method}", serialize, response.FromString)
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wake(_: object) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(done.set)

        call: Any = invoke.future(request, metadata=headers_of(namespace, lease))
        call.add_done_callback(wake)
        try:
            await done.wait()
        except trio.Cancelled:
            call.cancel()
            raise
        try:
            answer: _Response = call.result()
        except grpc.RpcError as exc:
            raise self._refused(method, call) from exc
        return answer

    async def _stream(self, method: str, request: Message, response: type[Message], namespace: str, lease: str) -> None:
        """One message there, any number back, which nobody needs. Their iterator blocks, hence the thread."""
        call: Any = self._channel.unary_stream(f"/{method}", serialize, response.FromString)(
            request, metadata=headers_of(namespace, lease)
        )

        def drain() -> None:
            for _ in call:
                pass

        try:
            # The stubs of trio-typing, which a dependency brings, are older than trio and hide its own types.
            await trio.to_thread.run_sync(drain, abandon_on_cancel=True, limiter=self._streams)  # type: ignore[call-arg]
        except trio.Cancelled:
            call.cancel()  # ends the thread as well
            raise
        except grpc.RpcError as exc:
            raise self._refused(method, call) from exc

    def _refused(self, method: str, call: Any) -> ContainerdError:
        code, details = call.code(), call.details()
        if code is grpc.StatusCode.UNAVAILABLE:
            return ContainerdError(f"containerd at {self._address} does not answer: {details}; is it running?", code)
        return ContainerdError(f"containerd refused {method.rpartition('.')[2]}: {details}", code)


@asynccontextmanager
async def open_containerd(address: str) -> AsyncIterator[Containerd]:
    """A client of the containerd at the socket `address` (a path, with or without `unix://`). Connects at the first call."""
    async with open_channel(address) as channel:
        yield Containerd(channel, address.removeprefix("unix://"))


@asynccontextmanager
async def open_channel(address: str) -> AsyncIterator[grpc.Channel]:
    """The connection below a client."""
    path = address.removeprefix("unix://")
    channel = grpc.insecure_channel(
        f"unix:{path}",
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            # grpcio would send the escaped path, which Go's server refuses as an authority.
            ("grpc.default_authority", "localhost"),
        ],
    )
    try:
        yield channel
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(channel.close)


def serialize(message: Message) -> bytes:
    """What grpcio calls to make the bytes of a request."""
    return message.SerializeToString()


def headers_of(namespace: str, lease: str) -> list[tuple[str, str]]:
    """The metadata of a call."""
    headers = {"containerd-namespace": namespace, "containerd-lease": lease}
    return [(key, value) for key, value in headers.items() if value]


async def together(*tasks: Callable[[], Awaitable[object]]) -> None:
    """Run tasks side by side; the first error of ours comes out as itself, and containerd's word only if there is no other:
    that a layer could not be served is what follows from why."""
    errors: list[ShoalError] = []

    async def run(task: Callable[[], Awaitable[object]], scope: trio.CancelScope) -> None:
        try:
            await task()
        except ShoalError as exc:
            errors.append(exc)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(run, task, nursery.cancel_scope)
    if errors:
        raise min(errors, key=lambda exc: isinstance(exc, ContainerdError))


def rfc3339_in(seconds: int) -> str:
    """The time so many seconds from now, as labels have it."""
    return (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
