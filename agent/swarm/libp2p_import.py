"""The only place where libp2p is imported, and the only one that bends an import.

py-libp2p 0.8.1 imports every transport, discovery and key type it knows: QUIC (aioquic), mDNS (zeroconf), ACME (requests),
WebSocket, UPnP, secp256k1 and more. A fleet uses TCP, Noise, Yamux, Kademlia and Ed25519 alone, and the rest costs 16 of
libp2p's 41 MB resident and 0.4 of its 1.8 s (measured, Python 3.11). So while libp2p is imported, those names resolve to empty stand-ins; afterwards the stand-ins are
taken out of `sys.modules`, so that anybody else who imports such a library gets the real one. One of its modules logs to
the root logger, which would also set up stderr; it is given a logger of its own. Code of libp2p that would
touch a stand-in is never reached here: no QUIC address is ever given to it, mDNS and AutoTLS are off; a member with a key of
another type fails in its own handshake.
"""

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import MutableSequence, Sequence
from typing import Any, Final

import structlog

log = structlog.get_logger()

_UNUSED: Final = frozenset(
    {
        "OpenSSL",
        "aioquic",
        "coincurve",
        "fastecdsa",
        "miniupnpc",
        "prometheus_client",
        "requests",
        "service_identity",
        "trio_websocket",
        "zeroconf",
    }
)


class _AbsentType(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent


class _Absent(metaclass=_AbsentType):
    """Stands for any class or constant of an absent library."""

    def __init__(self, *_args: object, **_options: object) -> None:
        raise RuntimeError("this library is not loaded, see agent.swarm.libp2p_import")

    def __class_getitem__(cls, _item: object) -> type:
        return cls


class _AbsentModule(types.ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012 - what the import system expects of a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in _UNUSED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class _LogBridge(logging.Handler):
    """libp2p's stdlib records as our debug events: it warns, and logs errors, whenever a peer goes away, which for a fleet is
    daily life. What an operator should know is logged by `agent.swarm` itself."""

    def emit(self, record: logging.LogRecord) -> None:
        log.debug("libp2p_notice", logger=record.name, level_name=record.levelname, text=record.getMessage()[:300])


def import_libp2p() -> None:
    """Import the parts of libp2p in use (once) and route its log records. Takes over a second: call it in a thread."""
    if "libp2p.host.basic_host" in sys.modules:
        return
    loaded = {name for name in sys.modules if name.partition(".")[0] in _UNUSED}
    finder = _AbsentFinder()
    sys.meta_path.insert(0, finder)
    try:
        for name in (
            "libp2p",
            "libp2p.host.basic_host",
            "libp2p.kad_dht.kad_dht",
            "libp2p.network.swarm",
            "libp2p.security.noise.transport",
            "libp2p.stream_muxer.yamux.yamux",
            "libp2p.transport.tcp.tcp",
        ):
            importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            if name.partition(".")[0] in _UNUSED and name not in loaded:
                del sys.modules[name]
    connection = importlib.import_module("libp2p.network.connection.swarm_connection")
    vars(connection)["logging"] = logging.getLogger("libp2p.network.connection")
    logging.getLogger("libp2p.network.auto_connector").setLevel(logging.WARNING)  # it sets INFO for itself
    logger = logging.getLogger("libp2p")
    logger.handlers.clear()
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(_LogBridge())
