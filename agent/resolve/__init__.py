"""The miss path: what is wanted, by whom, from where, until when."""

from agent.resolve.counters import Counters
from agent.resolve.queue import Priority
from agent.resolve.resolver import Resolver, open_resolver
from agent.resolve.sources import Source, Sourcing

__all__ = ["Counters", "Priority", "Resolver", "Source", "Sourcing", "open_resolver"]
