"""A hub of one model, which the real client downloads from: metadata by revision, and files with their tags."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


class FakeHub:
    """Serves the files of a directory as the model `me/NAME`, and keeps what was asked for in `requests`."""

    def __init__(self, folder: Path, name: str = "tiny"):
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.model = f"me/{name}"
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self, file: str) -> int:
        return self.requests.count(f"GET /{self.model}/resolve/{COMMIT}/{file}")

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.requests.append(f"{request.command} {path}")
        name = path.rpartition("/")[2]
        headers = {"X-Repo-Commit": COMMIT}
        if path.startswith(f"/api/models/{self.model}"):
            listed = [{"rfilename": file} for file in self.files]
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": COMMIT} for file, data in self.files.items()
            ]
            told = tree if "/tree/" in path else {"id": self.model, "sha": COMMIT, "siblings": listed}
            code, body = 200, json.dumps(told).encode()
        elif path.startswith(f"/{self.model}/resolve/") and name in self.files:
            code, body = 200, self.files[name]
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        else:
            code, body = 404, b"{}"
            headers["X-Error-Code"] = "EntryNotFound" if f"/{self.model}/" in path else "RepoNotFound"
        request.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
