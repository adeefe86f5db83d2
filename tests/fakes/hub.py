"""A stand-in for Hugging Face's hub on loopback, for downloads by `huggingface_hub`.

It answers as https://huggingface.co does: facts of a repository and its files, then each file by
its commit; large files by a redirect to another address, which also serves parts of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler

from . import Loopback

LARGE = (".safetensors", ".bin", ".h5", ".model", ".gguf")


class FakeHub(Loopback):
    """Starts on a free port; use as a context manager.

    Attributes:
      repositories: files by repository and name.
      gated: repositories that need an accepted licence, which the owner of `token` has.
      cuts: by name of a file, after how many bytes its connection is cut, once.
      broken: names of files that are sent with another content of the same length.
      refused: names of files that are not served.
      asked: a file's name, and the Range, of each request for its content.
    """

    token = "hf_accepted"

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cuts: dict[str, int] = {}
        self.broken: set[str] = set()
        self.refused: set[str] = set()
        self.asked: list[tuple[str, str]] = []

    def fetched(self) -> list[str]:
        """Returns the names of the files whose content was served, also in parts."""
        return [name for name, _ in self.asked]

    def commit(self, repository: str) -> str:
        return hashlib.sha1(repr(self.repositories[repository]).encode()).hexdigest()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._facts(request, found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(request, found[1], found[2], found[3])
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._content(request, found[2], self.repositories[found[1]][found[2]])
        else:
            self._send(request, 404)

    def _known(self, request: BaseHTTPRequestHandler, repository: str, revision: str) -> bool:
        if repository not in self.repositories:
            self._send(request, 401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", self.commit(repository)):
            self._send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _facts(self, request: BaseHTTPRequestHandler, repository: str, revision: str) -> None:
        if not self._known(request, repository, revision):
            return
        siblings = []
        for name, content in self.repositories[repository].items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            fact = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest()
                fact["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(fact)
        facts = {"id": repository, "sha": self.commit(repository), "siblings": siblings}
        self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(facts).encode())

    def _file(
        self, request: BaseHTTPRequestHandler, repository: str, revision: str, name: str
    ) -> None:
        if not self._known(request, repository, revision):
            return
        allowed = request.headers.get("Authorization") == f"Bearer {self.token}"
        if repository in self.gated and not allowed:
            self._send(request, 403 if "Authorization" in request.headers else 401,
                       {"X-Error-Code": "GatedRepo"})  # fmt: skip
            return
        content = self.repositories[repository].get(name)
        if content is None:
            self._send(request, 404, {"X-Error-Code": "EntryNotFound"})
            return
        facts = {"X-Repo-Commit": self.commit(repository)}
        if not name.endswith(LARGE):
            self._content(request, name, content, facts)
            return
        facts["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        facts["X-Linked-Size"] = str(len(content))
        # Another host name, because the client would follow a redirect to the same host.
        facts["Location"] = (
            f"{self.address.replace('127.0.0.1', 'localhost')}/cdn/{repository}/{name}"
        )
        self._send(request, 302, facts)

    def _content(
        self,
        request: BaseHTTPRequestHandler,
        name: str,
        content: bytes,
        facts: dict[str, str] | None = None,
    ) -> None:
        facts = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **(facts or {})}
        if request.command == "HEAD":
            self._send(request, 200, facts, content)
            return
        if name in self.refused:
            self._send(request, 403)
            return
        start = request.headers.get("Range", "")
        self.asked.append((name, start))
        if name in self.broken:
            content = bytes(len(content))
        whole, status = len(content), 200
        if start:
            first = int(start.removeprefix("bytes=").partition("-")[0])
            content, status = content[first:], 206
            facts["Content-Range"] = f"bytes {first}-{whole - 1}/{whole}"
        self._send(request, status, facts, content, self.cuts.pop(name, None))

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        facts: dict[str, str] | None = None,
        body: bytes = b"",
        cut: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in (facts or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[:cut])
        if cut is not None:
            request.wfile.flush()
            request.connection.shutdown(2)
            request.close_connection = True
