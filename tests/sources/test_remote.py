"""Weights read from the hub by HTTP ranges: the real huggingface_hub against a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM
from support.local_hub import COMMIT, TinyHub, endpoint_of, hub_environment, serve
from support.program import call


class RangeHub(TinyHub):
    """Answers with ranges of the weights, and breaks off, refuses or lies as the server's `faults` say."""

    def do_GET(self) -> None:
        server = self.server
        file = self.path.split("?")[0].removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if file.endswith(".safetensors") and file in server.files:  # type: ignore[attr-defined]
            assert self.command == "GET" and "Range" in self.headers, "the whole file was asked for"
            start, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            body = server.files[file][start : last + 1]  # type: ignore[attr-defined]
            server.ranges.append((file, start, last + 1))  # type: ignore[attr-defined]
            fault = server.faults.pop(0) if server.faults else None  # type: ignore[attr-defined]
            if fault == "breaks off":
                self.send_response(206)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return None
            if fault == "busy":
                return self.answer(b"", 503)
            return self.answer(body[:-1] if fault == "short" else body, 206)
        if "/api/models/org/tiny" in self.path and "/tree/" not in self.path:
            siblings = [
                {"rfilename": name, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
                for name, body in server.files.items()  # type: ignore[attr-defined]
            ]
            return self.answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        return super().do_GET()

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    files = {path.name: path.read_bytes() for path in TINYLM.iterdir() if path.is_file()}
    with serve(RangeHub, files=files, asked=set(), ranges=[], faults=[]) as server:
        yield server


def run(hub: ThreadingHTTPServer, home: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantkit", *map(str, args)],
        env={**hub_environment(home, endpoint_of(hub)), "PYTHONPATH": str(ROOT)},
        cwd=home,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("faults", [[], ["breaks off", "busy", "short"]], ids=["well", "with faults"])
def test_the_same_bytes_and_nothing_kept(hub: ThreadingHTTPServer, tmp_path: Path, faults: list[str]) -> None:
    hub.faults[:] = faults  # type: ignore[attr-defined]
    done = run(hub, tmp_path, "quantize", "org/tiny", "Q4_K_M", "--remote", "-o", "remote.gguf")
    assert done.returncode == 0, done.stderr
    local = tmp_path / "models--org--tiny" / "snapshots" / COMMIT  # as in the hub's cache, for the same name
    local.mkdir(parents=True)
    for path in TINYLM.iterdir():
        (local / path.name).symlink_to(path)
    call("quantize", local, "Q4_K_M", "-o", tmp_path / "local.gguf")
    assert (tmp_path / "remote.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
    assert not [path for path in tmp_path.rglob("*.safetensors") if not path.is_relative_to(local)]
    ranges = hub.ranges  # type: ignore[attr-defined]
    total = sum(stop - start for _, start, stop in ranges[len(faults) :])
    weights = sum(len(body) for name, body in hub.files.items() if name.endswith(".safetensors"))  # type: ignore[attr-defined]
    assert total < 1.3 * weights


def test_a_hub_that_gives_up_is_one_line(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    hub.faults[:] = ["short"] * 99  # type: ignore[attr-defined]
    done = run(hub, tmp_path, "convert", "org/tiny", "--remote", "-o", "out.gguf")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "cannot be read from the hub" in errors[0]
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("out*"))


def test_only_a_hub_id(tmp_path: Path) -> None:
    ended = call("convert", TINYLM, "--remote", "-o", tmp_path / "out.gguf", code=1)
    assert "only a model on the hub" in ended.stderr
