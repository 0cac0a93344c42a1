"""The data plane between nodes: blob ranges over mutual TLS, server and client."""

from agent.transfer.client import PeerBusy, PeerClient, open_peer_client
from agent.transfer.server import BlobReader, DataServer, open_data_server

__all__ = ["BlobReader", "DataServer", "PeerBusy", "PeerClient", "open_data_server", "open_peer_client"]
