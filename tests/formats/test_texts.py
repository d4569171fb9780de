"""WikiText-2 by name, against a local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.formats.texts import read_named

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPLITS = {split: f" = Title of {split} = \n\n café <unk> \n" for split in ("test", "valid", "train")}


def archive(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for split, text in members.items():
            file.writestr(f"wikitext-2-raw/wiki.{split}.raw", text)
    return buffer.getvalue()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as one file needs."""

    body = b""

    def do_GET(self) -> None:
        found = self.path.split("?")[0].startswith("/datasets/ggml-org/ci/resolve/") and self.path.endswith(
            "/wikitext-2-raw-v1.zip"
        )
        body = self.server.body if found else b"{}"  # type: ignore[attr-defined]
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"' + hashlib.sha1(body).hexdigest() + '"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.body, server.asked = archive(**SPLITS), []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(home: Path, name: str, server: ThreadingHTTPServer | None = None) -> str:
    """What `read_named(name)` returns in a fresh process, where huggingface_hub reads its environment."""
    program = (
        "import sys\n"
        "from quantkit.errors import QuantkitError\n"
        "from quantkit.formats.texts import read_named\n"
        f"try: sys.stdout.buffer.write(read_named({name!r}).encode())\n"
        "except QuantkitError as error: print('refused:', error)\n"
    )
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}" if server else "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": str(int(server is None)),
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


def test_it_is_fetched_once_and_its_splits_are_named(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert fetch(tmp_path, "wikitext-2", hub) == SPLITS["test"]
    asked = len(hub.asked)  # type: ignore[attr-defined]
    assert asked > 0
    assert fetch(tmp_path, "wikitext-2:train", hub) == SPLITS["train"]
    assert len(hub.asked) == asked  # type: ignore[attr-defined]
    assert fetch(tmp_path, "wikitext-2:valid") == SPLITS["valid"]


def test_offline_it_says_what_to_download_and_where(tmp_path: Path) -> None:
    answer = fetch(tmp_path, "wikitext-2")
    assert answer.startswith("refused: WikiText-2 is not cached, and the hub cannot be reached: download wikitext-2")
    assert "ggml-org/ci" in answer and str(tmp_path / "hub") in answer
    assert answer.count("\n") == 1


@pytest.mark.parametrize("body", [b"no archive", archive(test="only this"), archive(**SPLITS)[:-60]])
def test_a_damaged_archive_is_refused(hub: ThreadingHTTPServer, tmp_path: Path, body: bytes) -> None:
    hub.body = body  # type: ignore[attr-defined]
    answer = fetch(tmp_path, "wikitext-2:train", hub)
    assert answer.startswith("refused: ") and "damaged: no readable wikitext-2-raw/wiki.train.raw" in answer


def test_an_archive_that_swells_is_refused(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    hub.body = archive(test="x" * (65 << 20))  # type: ignore[attr-defined]
    assert "too large" in fetch(tmp_path, "wikitext-2", hub)


def test_other_names() -> None:
    assert read_named("notes.txt") is None
    assert read_named("wikitext-20") is None
    with pytest.raises(QuantkitError, match="no split 'dev': choose test, valid, train"):
        read_named("wikitext-2:dev")
