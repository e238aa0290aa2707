"""A Hugging Face Hub on the loopback: what huggingface_hub asks of one, from files in memory, with the faults that a hub has."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/?]+))?(?:\?.*)?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A model: its files at each commit, the newest last, and names of commits.

    `refused`: status and error code of all its files, as of a gated one. `cut`: after how many bytes the connection of a file ends;
    each is used once.
    """

    commits: dict[str, dict[str, bytes]]
    names: dict[str, str]
    refused: tuple[int, str] | None = None
    cut: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Hub:
    """The models by id, the requests so far (method, path and Range), and the tokens that came with them."""

    url: str = ""
    models: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def add(self, name: str, folder: Path, more: Mapping[str, bytes] | None = None, branch: str = "main") -> str:
        """Publish the files of a folder, and `more`, as the newest commit of a branch; return the commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        files |= more or {}
        commit = hashlib.sha1(repr(sorted(files.items())).encode() + branch.encode()).hexdigest()
        repository = self.models.setdefault(name, Repository({}, {}))
        repository.commits[commit] = files
        repository.names[branch] = commit
        return commit

    def loaded(self, name: str) -> list[str]:
        """Return the files of which bytes were asked for, in the order of their first request."""
        found = (_FILE.fullmatch(path) for method, path, _ in self.requests if method == "GET")
        return list(dict.fromkeys(match[3] for match in found if match is not None and match[1] == name))


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve a hub without models on a free port of the loopback."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *values: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        api, file = _API.fullmatch(self.path), _FILE.fullmatch(self.path)
        found = api or file
        repository = self.hub.models.get(found[1]) if found else None
        if found is None or repository is None:
            self._refuse(401, "RepoNotFound")
            return
        revision = (found[3] if api else found[2]) or "main"
        commit = repository.names.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            self._refuse(404, "RevisionNotFound")
        elif api:
            self._send_json(_tree(files) if api[2] == "tree" else _facts(found[1], commit, files))
        elif repository.refused is not None:
            self._refuse(*repository.refused)
        elif found[3] not in files:
            self._refuse(404, "EntryNotFound")
        else:
            self._send_file(files[found[3]], commit, repository.cut.get(found[3], []))

    def _send_file(self, data: bytes, commit: str, cuts: list[int]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start : start + cuts.pop(0)] if cuts else data[start:])
        self.close_connection = True

    def _send_json(self, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()
    ]


def _facts(name: str, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
    siblings = [{"rfilename": file} for file in files]
    return {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
