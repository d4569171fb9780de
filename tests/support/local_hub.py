"""A hub on this machine, and calls in fresh processes that ask it: huggingface_hub reads its environment once."""

from __future__ import annotations

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


def output_of(call: str, home: Path, endpoint: str, offline: bool = False) -> str:
    """What `call`, of `resolve` or `read_named`, returns in a fresh process, or "refused: " and the error's line."""
    program = (
        "import sys\n"
        "from quantkit.errors import QuantkitError\n"
        "from quantkit.sources.hub import resolve\n"
        "from quantkit.evaluate.texts import read_named\n"
        f"try: sys.stdout.buffer.write(str({call}).encode())\n"
        "except QuantkitError as error: print('refused:', error)\n"
    )
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
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.decode()
