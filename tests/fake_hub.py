"""A Hugging Face hub on 127.0.0.1 that answers as the real one does, and can be made to fail.

It knows repositories, tokens, gates, redirects to a second server for large files, ranges and cut
connections. Source: what huggingface_hub 0.30 to 2.4 asks for, and the headers it reads.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
LARGE = 1 << 16  # bytes; from here on a file is stored apart, as with Git LFS
RESOLVE = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)")
STORAGE = re.compile(r"/storage/((?:datasets/)?[^/]+/[^/]+)/(.+)")
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree|xet-read-token)/.+")


class FakeHub:
    """What the hub holds, whom it lets in, how it fails, and what it has served.

    Attributes:
        repositories: files by path, by repository; a data set's name starts with `datasets/`.
        tokens: the valid tokens and the gated repositories each may read.
        gated: repositories that need a token with access.
        failing: repositories whose every request is answered with this status.
        cuts: how many more downloads of a file end half-way.
        stores: repositories kept in Xet storage, and the address of that storage.
        requests: all that was asked, as "METHOD path".
        served: bytes of file bodies sent, by file.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.tokens: dict[str, set[str]] = {}
        self.gated: set[str] = set()
        self.failing: dict[str, int] = {}
        self.cuts: Counter[str] = Counter()
        self.stores: dict[str, str] = {}
        self.requests: list[str] = []
        self.served: Counter[str] = Counter()
        self.address = self.storage = ""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve the hub and its storage, each on a free port of 127.0.0.1."""
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in servers:
            server.daemon_threads = True
            server.hub = self  # type: ignore[attr-defined]
            Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{servers[0].server_port}"
        # Another name, as some versions take a redirect within one host for one within the hub.
        self.storage = f"http://localhost:{servers[1].server_port}"
        try:
            yield
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := STORAGE.fullmatch(path):
            self._body(match[1], match[2], {})
        elif match := API.fullmatch(path):
            prefix = "datasets/" if match[1] == "datasets" else ""
            name = prefix + match[2]
            # Gates are on files: anyone may list what a gated repository holds.
            if not self._refused(name):
                self._listing(name, match[3])
        elif match := RESOLVE.fullmatch(path):
            self._resolve(match[1], match[2])
        else:  # as the page of a network that wants a login first
            self._answer(200, {}, b"<html>welcome</html>")

    do_HEAD = do_GET

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, message: str, code: str = "") -> bool:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer(status, headers, json.dumps({"error": message}).encode())
        return True

    def _refused(self, name: str, *, gate: bool = False) -> bool:
        """Answer what the hub answers to those it does not let in."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if name in self.hub.failing:
            return self._refuse(self.hub.failing[name], "Internal Error")
        if token and token not in self.hub.tokens:
            return self._refuse(401, "Invalid credentials in Authorization header")
        if name not in self.hub.repositories:
            if token:
                return self._refuse(404, "Repository not found", "RepoNotFound")
            return self._refuse(401, "Invalid username or password.", "RepoNotFound")
        if gate and name in self.hub.gated and name not in self.hub.tokens.get(token, ()):
            if token == "narrow":
                return self._refuse(403, "Please enable access to public gated repositories")
            said = f"Access to {name} is restricted."
            return self._refuse(403 if token else 401, said, "GatedRepo")
        return False

    def _listing(self, name: str, what: str) -> None:
        files = self.hub.repositories[name]
        if what == "xet-read-token":
            store = self.hub.stores[name]
            headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "t"}
            self._answer(200, {**headers, "X-Xet-Token-Expiration": "9999999999"})
            return
        if what == "tree":
            answer: object = [
                {"type": "file", "path": path, "size": len(body), "oid": _sha1(body)}
                | ({"lfs": _lfs(body)} if len(body) >= LARGE else {})
                for path, body in files.items()
            ]
        else:
            siblings = [{"rfilename": path} for path in files]
            answer = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _resolve(self, name: str, file: str) -> None:
        if self._refused(name, gate=True):
            return
        body = self.hub.repositories[name].get(file)
        if body is None:
            self._refuse(404, "Entry not found", "EntryNotFound")
            return
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if len(body) < LARGE:
            self._body(name, file, {**headers, "ETag": f'"{_sha1(body)}"'})
            return
        headers |= {"X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{_sha256(body)}"'}
        if name in self.hub.stores:
            route = f"{self.hub.address}/api/models/{name}/xet-read-token/{COMMIT}"
            headers |= {"X-Xet-Hash": _sha256(body), "Link": f'<{route}>; rel="xet-auth"'}
        self._answer(302, {**headers, "Location": f"{self.hub.storage}/storage/{name}/{file}"})

    def _body(self, name: str, file: str, headers: dict[str, str]) -> None:
        """Send a file or the rest of it that is asked for; a cut one ends half-way."""
        body = self.hub.repositories[name][file]
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(match[1]) if match else 0
        part = body[start:]
        headers = {**headers, "Content-Length": str(len(part))}
        if match:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send_response(206 if match else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts[file] > 0:
            self.hub.cuts[file] -= 1
            part = part[: max(0, len(body) // 2 - start)]
            self.close_connection = True
        self.hub.served[file] += len(part)
        self.wfile.write(part)


def _sha1(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _lfs(body: bytes) -> dict[str, object]:
    return {"oid": _sha256(body), "size": len(body), "pointerSize": 134}
