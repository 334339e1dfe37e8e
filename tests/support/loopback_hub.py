"""A hub on the loopback device: what huggingface_hub asks for when it fetches a model."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REVISION = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves directories as models.

    Attributes:
        models: directory by hub id.
        gated: ids that need a token.
        requests: method and path of each request that came.
        breaks: file whose body stops half-way.
    """

    def __init__(self, models: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = models
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.breaks = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving(models: dict[str, Path]) -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    with Hub(models) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format, *args):  # noqa: A002
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        words = path.strip("/").split("/")
        name = "/".join(words[2:4] if words[0] == "api" else words[:2])
        directory = self.server.models.get(name)
        if directory is None:
            return self._refuse(401, "RepoNotFound")
        if name in self.server.gated:
            return self._refuse(403, "GatedRepo")
        rest = words[4:] if words[0] == "api" else words[2:]
        if rest[1] not in ("main", REVISION):
            return self._refuse(404, "RevisionNotFound")
        files = {each.name: each.read_bytes() for each in sorted(directory.iterdir())}
        if rest[0] == "revision":
            siblings = [{"rfilename": each} for each in files]
            return self._json({"id": name, "sha": REVISION, "siblings": siblings})
        if rest[0] == "tree":
            return self._json(
                [
                    {"type": "file", "path": each, "size": len(data), "oid": _sum(data)}
                    for each, data in files.items()
                ]
            )
        data = files[rest[2]]
        headers = {"ETag": f'"{_sum(data)}"', "X-Repo-Commit": REVISION}
        if body and self.server.breaks == rest[2]:
            self._send(200, len(data), headers)
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        return self._send(200, len(data), headers, data if body else b"")

    def _json(self, value) -> None:
        data = json.dumps(value).encode()
        self._send(200, len(data), {"Content-Type": "application/json"}, data)

    def _refuse(self, code: int, word: str) -> None:
        self._send(code, 0, {"X-Error-Code": word, "X-Error-Message": word})

    def _send(self, code: int, length: int, headers: dict[str, str], data: bytes = b"") -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _sum(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
