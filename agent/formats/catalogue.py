"""All formats with an index, in the order in which they are asked whether a layer is theirs."""

from importlib import import_module
from typing import Final

from agent.formats.opening import Format, LayerFacts

_MODULES: Final = ("agent.formats.estargz",)
"""Imported when the first layer is looked at: most agents see few formats, and a module that is not loaded takes no memory."""


def find_format(facts: LayerFacts) -> Format | None:
    """The format that the layer claims to be of; None for one without an index, which is read from its start."""
    for module in _MODULES:
        found: Format = import_module(module).FORMAT
        if found.recognises(facts):
            return found
    return None
