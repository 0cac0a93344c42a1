"""All formats with an index, in the order in which they are asked whether a layer is theirs."""

from importlib import import_module
from typing import Final

from agent.formats.opening import Format, LayerFacts

_FORMATS: Final = (
    ("agent.formats.estargz", "FORMAT"),
    ("agent.formats.zstd_chunked", "FORMAT"),
    ("agent.formats.nydus", "FORMAT"),
    ("agent.formats.nydus", "DATA_FORMAT"),
    ("agent.formats.soci", "FORMAT"),
)
_SOCI_V1: Final = ("agent.formats.soci", "FORMAT_V1")
_ALL: Final = (*_FORMATS, _SOCI_V1)


def find_format(facts: LayerFacts, *, soci_v1: bool = False) -> Format | None:
    """The format that the layer claims to be of; None for one without an index, which is read from its start.

    `soci_v1`: also take indexes that anybody who may push to the repository could have made.
    """
    for module, name in _ALL if soci_v1 else _FORMATS:
        found: Format = getattr(import_module(module), name)
        if found.recognises(facts):
            return found
    return None


def place_of(wanted: Format) -> str:
    """What `format_at` takes, in whatever process."""
    return next(f"{module}:{name}" for module, name in _ALL if getattr(import_module(module), name) is wanted)


def format_at(place: str) -> Format:
    """The format of which `place_of` says so."""
    found: Format = next(getattr(import_module(module), name) for module, name in _ALL if f"{module}:{name}" == place)
    return found
