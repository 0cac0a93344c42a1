"""What `shoal convert` runs: opens the places, keeps the scratch folder, ends well when it is interrupted."""

import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from agent.config import Settings
from agent.errors import SettingsError, ShoalError, StoreError
from agent.images.convert.containerd_place import ContainerdPlace
from agent.images.convert.converting import Conversion, Report, Wish
from agent.images.convert.layout_place import LayoutPlace
from agent.images.convert.places import LayoutName, PlaceName, parse_place
from agent.images.convert.registry_place import RegistryPlace
from agent.images.convert.writers import WRITERS
from agent.registry import ImageReference, Platform, RegistryClient, open_registry_client
from agent.runtimes.containerd.contents import ContentClient, open_content_client

SCRATCH: Final = Path("/var/tmp")  # noqa: S108 - a private folder is made in it


@attrs.frozen
class Request:
    """The command line."""

    source: str
    target: str
    form: str
    platforms: tuple[str, ...] = ()
    prioritized: tuple[str, ...] = ()
    is_forced: bool = False
    namespace: str = "default"
    scratch: Path = SCRATCH


def convert(settings: Settings, request: Request, progress: Callable[[dict[str, Any]], None]) -> Report:
    """Convert an image; returns when the target has it.

    Raises:
        SettingsError: the command line is wrong.
        ShoalError: it failed; the target has no new image, and no temporary file is left.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came; the same holds.
    """
    source = parse_place(request.source, is_target=False)
    target = parse_place(request.target, is_target=True)
    wish = Wish(tuple(parse_platform(text) for text in request.platforms), request.prioritized, request.is_forced)
    if request.form not in WRITERS:
        raise SettingsError(f"{request.form!r} is no format to convert to; there are {', '.join(WRITERS)}")
    try:
        return trio.run(_convert, settings, request, source, target, wish, progress)
    except BaseExceptionGroup as group:
        raise _most_telling(group) from group
    except OSError as exc:
        raise _readable(exc) from exc


async def _convert(
    settings: Settings,
    request: Request,
    source: PlaceName,
    target: PlaceName,
    wish: Wish,
    progress: Callable[[dict[str, Any]], None],
) -> Report:
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP))
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(_interrupt, signals)
        # From here on a signal does not end the process at once, so that what is made is removed.
        folder = Path(tempfile.mkdtemp(prefix="shoal-convert-", dir=request.scratch))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        opener = _Opener(settings, request, stack)
        taking = await opener.open(target, is_target=True)
        giving = await opener.open(source, is_target=False)
        report = await Conversion(giving, taking, WRITERS[request.form](), wish, folder, progress).run()
        nursery.cancel_scope.cancel()
    return report


async def _interrupt(signals: AsyncIterator[int]) -> None:
    async for _ in signals:
        raise KeyboardInterrupt


@attrs.define
class _Opener:
    _settings: Settings
    _request: Request
    _stack: AsyncExitStack
    _registry: RegistryClient | None = None
    _containerd: ContentClient | None = None

    async def open(self, name: PlaceName, *, is_target: bool) -> Any:
        if isinstance(name, LayoutName):
            place = LayoutPlace(name)
            if is_target:
                place.check_target()
            return place
        if isinstance(name, ImageReference):
            if self._registry is None:
                config = self._settings.docker_config or Path.home() / ".docker" / "config.json"
                self._registry = await self._stack.enter_async_context(
                    open_registry_client(self._settings.registry_hosts_dir, config, insecure=self._settings.insecure_registries)
                )
            return RegistryPlace(self._registry, name)
        if self._containerd is None:
            address = str(self._settings.containerd_address)
            self._containerd = await self._stack.enter_async_context(open_content_client(address))
        namespace = self._request.namespace
        lease = await self._stack.enter_async_context(self._containerd.open_lease(namespace)) if is_target else ""
        return ContainerdPlace(self._containerd, namespace, name.name, lease)


def parse_platform(text: str) -> Platform:
    """`linux/arm64` or `linux/arm/v7`.

    Raises:
        SettingsError: it is neither.
    """
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(part.isalnum() for part in parts):
        raise SettingsError(f"{text!r} is no platform; write linux/arm64 or linux/arm/v7")
    return Platform(*parts)


def _most_telling(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of errors that happened side by side: an interrupt, else one of ours, else all."""
    found = list(_leaves(group))
    for kind in (KeyboardInterrupt, SettingsError, ShoalError):
        for error in found:
            if isinstance(error, kind):
                # What is a defect must not hide behind an error of ours.
                return (
                    error if kind is KeyboardInterrupt or all(isinstance(one, ShoalError | OSError) for one in found) else group
                )
    system = [error for error in found if isinstance(error, OSError)]
    return _readable(system[0]) if len(system) == len(found) else group


def _leaves(group: BaseExceptionGroup[BaseException]) -> Any:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _readable(error: OSError) -> StoreError:
    where = f"{error.filename}: " if error.filename else ""
    return StoreError(f"cannot convert: {where}{error.strerror or error}", errno=error.errno or 0)
