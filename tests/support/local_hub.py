"""A hub on this machine, and calls in fresh processes that ask it: huggingface_hub reads its environment once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"  # an endpoint that refuses connections


class Hub(BaseHTTPRequestHandler):
    """Answers to GET and HEAD; a subclass defines `do_GET`, and names it `do_HEAD` too."""

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class TinyHub(Hub):
    """As much of the hub's HTTP interface as a download uses: the model org/tiny, with the server's `files`."""

    def do_GET(self) -> None:
        path, files = self.path.split("?")[0], self.server.files  # type: ignore[attr-defined]
        if "/gated/" in path:
            return self.answer(b"{}", 403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if "/absent/" in path:
            return self.answer(b"{}", 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if path.startswith("/api/models/org/tiny"):
            if "no-such" in path:
                return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for f, b in files.items()
                ]
                return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            return self.answer(json.dumps(info).encode(), Content_Type="application/json")
        file = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if file in files:
            tag = '"' + hashlib.sha1(files[file]).hexdigest() + '"'
            self.server.asked.add(file)  # type: ignore[attr-defined]
            return self.answer(files[file], ETag=tag, X_Repo_Commit=COMMIT)
        return self.answer(b"{}", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def serve(hub: type[Hub], **attributes: object) -> Iterator[ThreadingHTTPServer]:
    """A running server, which has `attributes` for its hub to use."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    vars(server).update(attributes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def endpoint_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def hub_environment(home: Path, endpoint: str, offline: bool = False) -> dict[str, str]:
    """The environment of a process that knows no hub but `endpoint`, and no files but those in `home`."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
        environment.pop(name, None)
    return environment


def output_of(call: str, home: Path, endpoint: str, offline: bool = False) -> str:
    """What `call`, of a function that asks the hub, returns in a fresh process, or "refused: " and the error's line."""
    program = (
        "import sys\n"
        "from quantkit.errors import QuantkitError\n"
        "from quantkit.sources.hub import gguf_of, resolve\n"
        "from quantkit.evaluate.texts import read_named\n"
        f"try: sys.stdout.buffer.write(str({call}).encode())\n"
        "except QuantkitError as error: print('refused:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=hub_environment(home, endpoint, offline),
        capture_output=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.decode()
