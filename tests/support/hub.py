"""A hub on loopback that serves one folder, counts what it is asked for, and knows ranges."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NAME, COMMIT = "some/moe", "b" * 40


@dataclass
class Hub:
    """Where it is, and how many bytes of each file it gave."""

    address: str
    given: dict[str, int] = field(default_factory=dict)

    def environment(self, home: Path) -> dict[str, str]:
        """Return what makes a process ask this hub."""
        quiet = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*"}
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(home), **quiet}


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serve a folder as a model while the context lasts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            files = [file for file in folder.iterdir() if file.is_file()]
            if path.startswith("/api/models/"):
                named = [{"rfilename": file.name} for file in files]
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                about = {"id": NAME, "modelId": NAME, "sha": COMMIT, "private": False, "siblings": named}
                self.send(200, json.dumps(tree if "/tree/" in path else about).encode(), body)
                return
            file = folder / path.rsplit("/", 1)[-1]
            if not file.is_file():
                self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
                return
            data, status = file.read_bytes(), 200
            about = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if wanted := self.headers.get("range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                data, status = data[int(first) : int(last) + 1], 206
            if body:
                hub.given[file.name] = hub.given.get(file.name, 0) + len(data)
            self.send(status, data, body, about)

        def send(self, status: int, data: bytes, body: bool, about: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(about or {}), "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
