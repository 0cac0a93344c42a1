"""The gRPC end of the snapshotter: `containerd.services.snapshots.v1.Snapshots` on a unix socket.

grpcio's synchronous server runs each request in a thread of its bounded pool; the thread starts a task in our nursery and waits
for it. A request that the client gives up on cancels its task. Measured against containerd this costs 0.6 ms a request, and
libp2p brings grpcio anyway.
"""

import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
import trio
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from agent.errors import SettingsError, ShoalError
from agent.runtimes.containerd.filters import FilterError
from agent.runtimes.containerd.mounts import Mount
from agent.runtimes.containerd.proto import mount_pb2, snapshots_pb2
from agent.runtimes.containerd.snapshots import (
    Snapshot,
    SnapshotExists,
    SnapshotInvalid,
    SnapshotNotFound,
    SnapshotRefused,
    SnapshotUnavailable,
)
from agent.runtimes.containerd.snapshotter import Snapshotter

log = structlog.get_logger()

SERVICE: Final = "containerd.services.snapshots.v1.Snapshots"
MAX_MESSAGE_BYTES: Final = 16 << 20
"""containerd's own limit in both directions (defaults.DefaultMaxRecvMsgSize)."""

THREADS: Final = 32
"""Requests at once; more wait in grpcio's queue. Only Prepare is ever slow, and containerd prepares one layer of an image at a
time, so this is images pulled at once, with room for the quick requests beside them."""

INFOS_A_BATCH: Final = 100
"""Records in one answer of List, as containerd sends them; 100 records of the longest labels stay under the limit."""

STOP_S: Final = 2.0
MAX_SOCKET_PATH: Final = 107 - len(".new")
"""sun_path less its NUL, and room for the name the socket is made under."""

_STATUS: Final = (
    (SnapshotExists, grpc.StatusCode.ALREADY_EXISTS),
    (SnapshotNotFound, grpc.StatusCode.NOT_FOUND),
    (SnapshotRefused, grpc.StatusCode.FAILED_PRECONDITION),
    ((SnapshotInvalid, FilterError), grpc.StatusCode.INVALID_ARGUMENT),
    (SnapshotUnavailable, grpc.StatusCode.UNAVAILABLE),
)

_Answer = Callable[[Any], Awaitable[Any]]


class _Methods:
    """Each method of the API in terms of `Snapshotter`: request message in, answer message out."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    async def prepare(self, request: snapshots_pb2.PrepareSnapshotRequest) -> snapshots_pb2.PrepareSnapshotResponse:
        mounts = await self._snapshotter.prepare(request.key, request.parent, dict(request.labels))
        return snapshots_pb2.PrepareSnapshotResponse(mounts=map(_mount, mounts))

    async def view(self, request: snapshots_pb2.ViewSnapshotRequest) -> snapshots_pb2.ViewSnapshotResponse:
        mounts = await self._snapshotter.view(request.key, request.parent, dict(request.labels))
        return snapshots_pb2.ViewSnapshotResponse(mounts=map(_mount, mounts))

    async def mounts(self, request: snapshots_pb2.MountsRequest) -> snapshots_pb2.MountsResponse:
        return snapshots_pb2.MountsResponse(mounts=map(_mount, await self._snapshotter.mounts(request.key)))

    async def commit(self, request: snapshots_pb2.CommitSnapshotRequest) -> Empty:
        await self._snapshotter.commit(request.name, request.key, dict(request.labels), request.parent)
        return Empty()

    async def remove(self, request: snapshots_pb2.RemoveSnapshotRequest) -> Empty:
        await self._snapshotter.remove(request.key)
        return Empty()

    async def stat(self, request: snapshots_pb2.StatSnapshotRequest) -> snapshots_pb2.StatSnapshotResponse:
        return snapshots_pb2.StatSnapshotResponse(info=_info(await self._snapshotter.stat(request.key)))

    async def update(self, request: snapshots_pb2.UpdateSnapshotRequest) -> snapshots_pb2.UpdateSnapshotResponse:
        changed = await self._snapshotter.update(request.info.name, dict(request.info.labels), list(request.update_mask.paths))
        return snapshots_pb2.UpdateSnapshotResponse(info=_info(changed))

    async def select(self, request: snapshots_pb2.ListSnapshotsRequest) -> list[Snapshot]:
        return await self._snapshotter.select(list(request.filters))

    async def usage(self, request: snapshots_pb2.UsageRequest) -> snapshots_pb2.UsageResponse:
        usage = await self._snapshotter.usage(request.key)
        return snapshots_pb2.UsageResponse(size=usage.size, inodes=usage.inodes)

    async def cleanup(self, request: snapshots_pb2.CleanupRequest) -> Empty:  # noqa: ARG002 one snapshotter lives here
        await self._snapshotter.cleanup()
        return Empty()


class _GivenUp(Exception):
    """The task of a request was cancelled."""


class _Bridge:
    """Runs the methods, called from grpcio's threads, as tasks of one nursery."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._is_open = True

    def close(self) -> None:
        """No task starts after this."""
        with self._lock:
            self._is_open = False

    def run(self, answer: _Answer, request: Message, context: grpc.ServicerContext) -> Any:
        """Wait in this thread for the method; ends the request with the status of whatever it raised."""
        future: Future[Any] = Future()
        scope = trio.CancelScope()
        if not context.add_callback(lambda: self._soon(scope.cancel)):
            context.abort(grpc.StatusCode.CANCELLED, "the client went away")
        if not self._soon(self._nursery.start_soon, self._settle, answer, request, scope, future):
            context.abort(grpc.StatusCode.UNAVAILABLE, "the agent is stopping")
        try:
            return future.result()
        except _GivenUp:
            context.abort(grpc.StatusCode.CANCELLED, "the request was given up, or the agent is stopping")
        except ShoalError as exc:
            context.abort(next((code for kind, code in _STATUS if isinstance(exc, kind)), grpc.StatusCode.INTERNAL), str(exc))
        except Exception as exc:  # the component's edge: a defect fails one request
            log.exception("snapshot_request_failed", request=type(request).__name__)
            context.abort(grpc.StatusCode.INTERNAL, f"{type(request).__name__} failed: {exc!r}; the agent's log has more")

    def _soon(self, work: Callable[..., object], *arguments: object) -> bool:
        with self._lock:
            if self._is_open:
                self._token.run_sync_soon(work, *arguments)
            return self._is_open

    async def _settle(self, answer: _Answer, request: Message, scope: trio.CancelScope, future: Future[Any]) -> None:
        try:
            with scope:
                future.set_result(await answer(request))
        except Exception as exc:  # noqa: BLE001 raised again in the waiting thread
            future.set_exception(exc)
        finally:
            if not future.done():
                future.set_exception(_GivenUp())


@asynccontextmanager
async def serve_snapshots(snapshotter: Snapshotter, path: Path) -> AsyncIterator[None]:
    """Answer containerd at the unix socket `path` (mode 0600) until the block ends. A socket left by a dead agent is replaced.

    Raises:
        SettingsError: the path is too long, not a socket, or another agent answers there.
    """
    _check_path(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    async with trio.open_nursery() as nursery:
        bridge = _Bridge(nursery)
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="snapshots")
        server = grpc.server(
            pool,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ],
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, _handlers(_Methods(snapshotter), bridge)),)
        )
        try:
            server.add_insecure_port(f"unix:{fresh}")
        except RuntimeError as exc:
            raise SettingsError(f"cannot listen at {path}: {exc}") from exc
        # Only now does anything answer at the final name, and never with the wider mode that bind gave it.
        fresh.chmod(0o600)
        server.start()
        fresh.rename(path)
        inode = path.stat().st_ino
        log.info("snapshotter_listening", socket=str(path))
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                if path.stat().st_ino == inode:
                    path.unlink()
            nursery.cancel_scope.cancel()
            bridge.close()
            stopped = server.stop(grace=None)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(stopped.wait, STOP_S)
            pool.shutdown(wait=False, cancel_futures=True)


def _check_path(path: Path) -> None:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise SettingsError(f"{path} is too long for a socket (at most {MAX_SOCKET_PATH} bytes); choose a shorter --run-dir")
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise SettingsError(f"{path} exists and is no socket; remove it or choose another --run-dir")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return
    raise SettingsError(f"another agent answers at {path}; stop it or choose another --run-dir")


def _handlers(methods: _Methods, bridge: _Bridge) -> dict[str, grpc.RpcMethodHandler]:
    def unary(answer: _Answer, request: type[Message]) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            lambda message, context: bridge.run(answer, message, context),
            request.FromString,
            lambda message: message.SerializeToString(),
        )

    def listing(message: Message, context: grpc.ServicerContext) -> Iterator[snapshots_pb2.ListSnapshotsResponse]:
        found: list[Snapshot] = bridge.run(methods.select, message, context)
        for at in range(0, len(found), INFOS_A_BATCH):
            yield snapshots_pb2.ListSnapshotsResponse(info=map(_info, found[at : at + INFOS_A_BATCH]))

    return {
        "Prepare": unary(methods.prepare, snapshots_pb2.PrepareSnapshotRequest),
        "View": unary(methods.view, snapshots_pb2.ViewSnapshotRequest),
        "Mounts": unary(methods.mounts, snapshots_pb2.MountsRequest),
        "Commit": unary(methods.commit, snapshots_pb2.CommitSnapshotRequest),
        "Remove": unary(methods.remove, snapshots_pb2.RemoveSnapshotRequest),
        "Stat": unary(methods.stat, snapshots_pb2.StatSnapshotRequest),
        "Update": unary(methods.update, snapshots_pb2.UpdateSnapshotRequest),
        "List": grpc.unary_stream_rpc_method_handler(
            listing, snapshots_pb2.ListSnapshotsRequest.FromString, lambda message: message.SerializeToString()
        ),
        "Usage": unary(methods.usage, snapshots_pb2.UsageRequest),
        "Cleanup": unary(methods.cleanup, snapshots_pb2.CleanupRequest),
    }


def _mount(mount: Mount) -> mount_pb2.Mount:
    return mount_pb2.Mount(type=mount.type, source=mount.source, options=mount.options)


def _info(snapshot: Snapshot) -> snapshots_pb2.Info:
    return snapshots_pb2.Info(
        name=snapshot.name,
        parent=snapshot.parent,
        kind=snapshots_pb2.Kind.Name(int(snapshot.kind)),
        created_at=_time(snapshot.created_ns),
        updated_at=_time(snapshot.updated_ns),
        labels=dict(snapshot.labels),
    )


def _time(nanoseconds: int) -> Timestamp:
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)
