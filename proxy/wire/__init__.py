"""The PostgreSQL frontend/backend protocol, version 3, sans-IO: bytes in, messages out.

A leaf package: it imports nothing of ours and does no I/O, so the relay (`proxy`), the engine's step sessions
(`engine`) and the tests share one codec. Where to look:

* `messages`: every message type and request code by name, with its direction
* `frames`: message boundaries (`FrameParser` for whole messages, `FrameSplitter` for a relay)
* `build`, `backend`: encoders and decoders of payloads
* `auth`: the client side of authentication
* `states`: the protocol's states as tables, and which reply belongs to which request
"""
