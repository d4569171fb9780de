"""WikiText-2 by name, against a local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from support.local_hub import COMMIT, NOWHERE, Hub, endpoint_of, output_of, serve

from quantkit.errors import QuantkitError
from quantkit.evaluate.texts import read_named

SPLITS = {split: f" = Title of {split} = \n\n café <unk> \n" for split in ("test", "valid", "train")}


def archive(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for split, text in members.items():
            file.writestr(f"wikitext-2-raw/wiki.{split}.raw", text)
    return buffer.getvalue()


class WikitextHub(Hub):
    """As much of the hub's HTTP interface as one file needs."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        found = path.startswith("/datasets/ggml-org/ci/resolve/") and path.endswith("/wikitext-2-raw-v1.zip")
        body = self.server.body if found else b"{}"  # type: ignore[attr-defined]
        self.server.asked.append(path)  # type: ignore[attr-defined]
        tag = '"' + hashlib.sha1(body).hexdigest() + '"'
        self.answer(body, 200 if found else 404, ETag=tag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    with serve(WikitextHub, body=archive(**SPLITS), asked=[]) as server:
        yield server


def fetch(home: Path, name: str, server: ThreadingHTTPServer | None = None) -> str:
    endpoint = endpoint_of(server) if server else NOWHERE
    return output_of(f"read_named({name!r})", home, endpoint, offline=server is None)


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
