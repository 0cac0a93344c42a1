"""containerd's content store and image records: whole images in and out, for `shoal convert`.

Everything written is held by a lease until the image record holds it. Blobs travel in messages of 1 MiB on one stream each, which
a worker thread drives because grpcio's streams block.
"""

import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import grpc
import trio
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from agent.runtimes.containerd.client import LEASE_S, Containerd, ContainerdError, headers_of, open_channel, rfc3339_in, serialize
from agent.runtimes.containerd.proto import content_pb2, descriptor_pb2, images_pb2, leases_pb2

_CONTENT: Final = "containerd.services.content.v1.Content"
_IMAGES: Final = "containerd.services.images.v1.Images"
_LEASES: Final = "containerd.services.leases.v1.Leases"
_MESSAGE: Final = 1 << 20
"""What containerd's own clients send at a time; the limit of a message is 16 MiB."""


class ContentClient(Containerd):
    """See the module's text; made by `open_content_client`."""

    @asynccontextmanager
    async def open_lease(self, namespace: str) -> AsyncIterator[str]:
        """A lease that ends with the block; what has no image record then is garbage."""
        lease = f"shoal-{secrets.token_hex(8)}"
        create = leases_pb2.CreateRequest(id=lease, labels={"containerd.io/gc.expire": rfc3339_in(24 * LEASE_S)})
        await self._call(f"{_LEASES}/Create", create, leases_pb2.CreateResponse, namespace)
        try:
            yield lease
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2), suppress(ContainerdError):
                await self._call(f"{_LEASES}/Delete", leases_pb2.DeleteRequest(id=lease), Empty, namespace)

    async def find_image(self, namespace: str, name: str) -> tuple[str, str, int] | None:
        """Media type, digest and size of what an image record points at; None if there is no such record.

        Raises:
            ContainerdError: containerd did not tell.
        """
        request = images_pb2.GetImageRequest(name=name)
        try:
            answer = await self._call(f"{_IMAGES}/Get", request, images_pb2.GetImageResponse, namespace)
        except ContainerdError as exc:
            if exc.code is grpc.StatusCode.NOT_FOUND:
                return None
            raise
        target = answer.image.target
        return target.media_type, target.digest, target.size

    async def put_image(self, namespace: str, name: str, media_type: str, digest: str, size: int) -> None:
        """Make the record, or let it point here from now on.

        Raises:
            ContainerdError: containerd refused.
        """
        target = descriptor_pb2.Descriptor(media_type=media_type, digest=digest, size=size)
        await self._put_record(namespace, images_pb2.Image(name=name, target=target))

    async def has_blob(self, namespace: str, digest: str, lease: str = "") -> bool:
        """Is the blob there? With a lease it also stays there.

        Raises:
            ContainerdError: containerd did not tell.
        """
        request = content_pb2.InfoRequest(digest=digest)
        try:
            await self._call(f"{_CONTENT}/Info", request, content_pb2.InfoResponse, namespace)
            if lease:
                resource = leases_pb2.Resource(id=digest, type="content")
                add = leases_pb2.AddResourceRequest(id=lease, resource=resource)
                await self._call(f"{_LEASES}/AddResource", add, Empty, namespace)
        except ContainerdError as exc:
            if exc.code is grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return True

    async def read_blob(self, namespace: str, digest: str, offset: int, size: int, into: BinaryIO) -> None:
        """Write a part of a blob to a file. The bytes are not verified.

        Raises:
            ContainerdError: containerd does not have it, or has less.
        """
        request = content_pb2.ReadContentRequest(digest=digest, offset=offset, size=size)
        call: Any = self._channel.unary_stream(f"/{_CONTENT}/Read", serialize, content_pb2.ReadContentResponse.FromString)(
            request, metadata=headers_of(namespace, "")
        )

        def copy() -> int:
            return sum(into.write(answer.data) for answer in call)

        got = await self._in_thread("Read", call, copy)
        if got != size:
            raise ContainerdError(f"containerd sent {got} of the {size} bytes of {digest}")

    async def write_blob(
        self, namespace: str, lease: str, digest: str, size: int, data: Path | bytes, labels: Mapping[str, str]
    ) -> None:
        """Put a blob into the content store; its labels say what it keeps alive.

        Raises:
            ContainerdError: containerd refused it. Nothing of it is left.
        """
        ref = f"shoal-{secrets.token_hex(8)}"
        requests = _requests(ref, digest, size, data, labels)
        write = self._channel.stream_stream(f"/{_CONTENT}/Write", serialize, content_pb2.WriteContentResponse.FromString)
        call: Any = write(requests, metadata=headers_of(namespace, lease))

        def drain() -> None:
            for _ in call:
                """Each message is answered; an error ends the stream."""

        try:
            await self._in_thread("Write", call, drain)
        except ContainerdError as exc:
            if exc.code is not grpc.StatusCode.ALREADY_EXISTS:
                await self._abort(namespace, ref)
                raise
            await self._relabel(namespace, lease, digest, labels)
        except trio.Cancelled:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                await self._abort(namespace, ref)
            raise

    async def _relabel(self, namespace: str, lease: str, digest: str, labels: Mapping[str, str]) -> None:
        if labels:
            update = content_pb2.UpdateRequest(
                info=content_pb2.Info(digest=digest, labels=labels),
                update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
            )
            await self._call(f"{_CONTENT}/Update", update, content_pb2.UpdateResponse, namespace, lease)

    async def _abort(self, namespace: str, ref: str) -> None:
        with suppress(ContainerdError):
            await self._call(f"{_CONTENT}/Abort", content_pb2.AbortRequest(ref=ref), Empty, namespace)

    async def _in_thread(self, method: str, call: Any, work: Any) -> Any:
        try:
            return await trio.to_thread.run_sync(  # type: ignore[call-arg]  # as in the base class
                partial(work), abandon_on_cancel=True, limiter=self._streams
            )
        except trio.Cancelled:
            call.cancel()  # ends the thread as well
            raise
        except grpc.RpcError as exc:
            raise self._refused(method, call) from exc


@asynccontextmanager
async def open_content_client(address: str) -> AsyncIterator[ContentClient]:
    """Like `open_containerd`."""
    async with open_channel(address) as channel:
        yield ContentClient(channel, address.removeprefix("unix://"))


def _requests(
    ref: str, digest: str, size: int, data: Path | bytes, labels: Mapping[str, str]
) -> Iterator[content_pb2.WriteContentRequest]:
    """The messages that write a blob, the last of them with the commit."""
    offset = 0
    for block in _blocks(data):
        yield content_pb2.WriteContentRequest(
            action=content_pb2.WriteAction.WRITE, ref=ref, total=size, expected=digest, offset=offset, data=block
        )
        offset += len(block)
    yield content_pb2.WriteContentRequest(
        action=content_pb2.WriteAction.COMMIT, ref=ref, total=size, expected=digest, offset=offset, labels=labels
    )


def _blocks(data: Path | bytes) -> Iterator[bytes]:
    if isinstance(data, bytes):
        for at in range(0, len(data), _MESSAGE):
            yield data[at : at + _MESSAGE]
        return
    with data.open("rb") as file:
        while block := file.read(_MESSAGE):
            yield block
