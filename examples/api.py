"""A stand-in for the web services that the examples call, on this machine: `python3 examples/api.py [PORT]` (8099).

    POST /v1/embeddings       texts to vectors of 32 numbers: `{"model": ..., "input": [text, ...]}`, as OpenAI has it
    POST /chat                a message for people: `{"text": ...}`
    GET  /companies/<domain>  what is known of a company; unknown: 404. For a domain that begins with "busy" the first
                              two calls are answered with 503, for one that begins with "down" all
    POST /crm/leads           takes a lead once per Idempotency-Key
    GET  /log                 the requests so far, as JSON: method, path, idempotency_key, body, status
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "Bearer sk-demo"
COMPANIES = {
    "acme.example": {"name": "Acme Corporation", "employees": 120, "country": "US"},
    "busy-bees.example": {"name": "Busy Bees Ltd", "employees": 35, "country": "GB"},
    "sturm.example": {"name": "Sturm & Söhne \"KG\"", "employees": 7, "country": "DE"},
}


def embedding(text: str) -> list[float]:
    """32 numbers that depend on the words of a text: no model, but alike texts are near each other."""
    vector = [0.0] * 32
    for word in re.findall(r"\w+", text.lower()):
        vector[hashlib.sha256(word[:5].encode()).digest()[0] % 32] += 1.0
    length = math.sqrt(sum(x * x for x in vector)) or 1.0
    return [round(x / length, 6) for x in vector]


class Api(ThreadingHTTPServer):
    """The server and what it remembers."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.calls: Counter[str] = Counter()
        self.leads: dict[str, Any] = {}
        self.log: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Api
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/log":
            self.reply(200, self.server.log)
        elif self.path.startswith("/companies/"):
            domain = self.path.removeprefix("/companies/")
            self.server.calls[domain] += 1
            if domain.startswith("down") or (domain.startswith("busy") and self.server.calls[domain] <= 2):
                self.note(503, {"error": "come back later"})
            elif domain in COMPANIES:
                self.note(200, COMPANIES[domain])
            else:
                self.note(404, {"error": f"no company {domain}"})
        else:
            self.note(404, {"error": "no such page"})

    def do_POST(self) -> None:
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        except ValueError:
            return self.note(400, {"error": "the body is no JSON"})
        if self.path == "/v1/embeddings":
            if self.headers.get("Authorization") != KEY:
                return self.note(401, {"error": "wrong key"}, body)
            data = [{"index": i, "embedding": embedding(text)} for i, text in enumerate(body["input"])]
            return self.note(200, {"model": body["model"], "data": data}, body)
        if self.path == "/chat":
            return self.note(200, {"ok": True}, body)
        if self.path == "/crm/leads":
            key = self.headers.get("Idempotency-Key", "")
            number = self.server.leads.setdefault(key, {"number": len(self.server.leads) + 1, "lead": body})["number"]
            return self.note(201, {"lead": number}, body)
        return self.note(404, {"error": "no such page"}, body)

    def note(self, status: int, answer: Any, body: Any = None) -> None:
        """Remembers the request, and answers it."""
        with self.server.lock:
            self.server.log.append({"method": self.command, "path": self.path, "status": status, "body": body,
                                    "idempotency_key": self.headers.get("Idempotency-Key")})
        self.reply(status, answer)

    def reply(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal: see /log."""


if __name__ == "__main__":
    api = Api(int(sys.argv[1]) if len(sys.argv) > 1 else 8099)
    print(f"http://127.0.0.1:{api.server_port}", flush=True)
    try:
        api.serve_forever()
    except KeyboardInterrupt:
        api.server_close()
