"""How client commands talk to a running agent: one unix socket, `RUN_DIR/agent.sock`.

A call is one frame `{"call": name, "args": {...}}`; the answer is any number of `{"event": {...}}` frames (progress) and then one
`{"result": ...}` or `{"error": text}`. A frame is a little-endian u32 length and that many bytes of msgpack, at most 4 MiB.
The socket is readable by root alone; there is no other authentication.
"""
