"""A stand-in of the hub's transport: the few requests that weights and data sets take."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(models=None, datasets=None):
    """Serve repositories, name -> {path: bytes}; yields (address, paths that were asked for)."""
    asked = []
    repositories = {("models", n): f for n, f in (models or {}).items()}
    repositories |= {("datasets", n): f for n, f in (datasets or {}).items()}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def do_POST(self):
            self.answer(body=True)

        def answer(self, body):
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(f"{self.command} /{path}")
            length = int(self.headers.get("Content-Length", 0))
            sent = self.rfile.read(length) if length else b""
            for (kind, name), files in repositories.items():
                found = reply(kind, name, files, path, sent, self.headers)
                if found is not None:
                    return self.send(*found, body)
            return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)

        def send(self, status, headers, data, body):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(kind, name, files, path, sent, headers):
    """(status, headers, data) for a request to one repository, or None when it is to another."""
    listing = [
        {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
        for p, d in files.items()
    ]
    base = name if kind == "models" else f"{kind}/{name}"
    if path.startswith(f"{base}/resolve/"):
        file = path.removeprefix(f"{base}/resolve/").split("/", 1)[1]
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"{}"
        data = files[file]
        known = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        return 200, known, data
    api = f"api/{kind}/{name}"
    if path != api and not path.startswith(f"{api}/"):
        return None
    rest = path.removeprefix(api).strip("/")
    if rest.startswith("tree/"):
        return _json(listing)
    if rest.startswith("paths-info/"):
        text = sent.decode()
        wanted = [entry for entry in listing if entry["path"] in unquote(text)]
        return _json(wanted)
    if rest == "" or rest.startswith("revision/"):
        siblings = [{"rfilename": p, "size": len(d)} for p, d in files.items()]
        return _json(
            {
                "id": name,
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "cardData": {},
                "lastModified": "2024-01-01T00:00:00.000Z",
            }
        )
    return 404, {}, b"{}"


def _json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
