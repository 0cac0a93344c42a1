"""Generated from containerd's API by tests/conformance/generate_proto.py; never edited."""
