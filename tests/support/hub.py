"""A hub on loopback that serves one folder, counts what it is asked for, and knows ranges."""

from __future__ import annotations

import base64
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
    """Where it is, how many bytes of each file it gave, the paths that it was asked for, and
    what it was given."""

    address: str
    given: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    taken: dict[str, bytes] = field(default_factory=dict)

    def environment(self, home: Path) -> dict[str, str]:
        """Return what makes a process ask this hub."""
        quiet = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*"}
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(home), **quiet}

    def take(self, path: str, sent: bytes) -> dict:
        """Take what is uploaded, and return the answer: a repository is made, its files are wanted, they are there."""
        if path == "/api/repos/create":
            named = json.loads(sent)
            return {"url": f"{self.address}/{named['organization']}/{named['name']}"}
        if path == "/api/validate-yaml":  # of the card
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(sent)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        files = [line["value"] for line in map(json.loads, sent.splitlines()) if line["key"] == "file"]
        self.taken |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        return {"success": True, "commitUrl": f"{self.address}/{NAME}/commit/{COMMIT}", "commitOid": COMMIT}


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

        def do_POST(self) -> None:
            path, sent = self.path.split("?")[0], self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(path)
            self.send(200, json.dumps(hub.take(path, sent)).encode(), True)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            hub.asked.append(path)
            files = [file for file in folder.iterdir() if file.is_file()]
            if path == "/api/whoami-v2":
                known = self.headers.get("authorization") == "Bearer hf_known"
                self.send(200 if known else 401, json.dumps({"name": "some", "type": "user"}).encode(), body)
                return
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
