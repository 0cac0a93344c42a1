"""What is on disk: blobs, volumes, the maps of what is here, the catalogue; quota, eviction and recovery."""

from agent.store.layer import StoredLayer
from agent.store.scrubbing import BadSpot, ScrubProgress, ScrubReport
from agent.store.store import Store, open_store

__all__ = ["BadSpot", "ScrubProgress", "ScrubReport", "Store", "StoredLayer", "open_store"]
