"""Hub ids, with the real huggingface_hub against a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from support.local_hub import COMMIT, NOWHERE, Hub, endpoint_of, output_of, serve

from quantkit.errors import QuantkitError
from quantkit.sources.hub import repo_id_of, resolve

FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "README.md": b"# A model\n",
    "model-00001-of-00001.safetensors": b"weights",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"the same weights again",
    "consolidated.safetensors": b"and again",
    "onnx/model.onnx": b"and again",
}


class TinyHub(Hub):
    """As much of the hub's HTTP interface as a download uses."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
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
                    for f, b in FILES.items()
                ]
                return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": f} for f in FILES]}
            return self.answer(json.dumps(info).encode(), Content_Type="application/json")
        file = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if file in FILES:
            tag = '"' + hashlib.sha1(FILES[file]).hexdigest() + '"'
            self.server.asked.add(file)  # type: ignore[attr-defined]
            return self.answer(FILES[file], ETag=tag, X_Repo_Commit=COMMIT)
        return self.answer(b"{}", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    with serve(TinyHub, asked=set()) as server:
        yield server


def fetch(home: Path, endpoint: str, *arguments: object, offline: bool = False) -> str:
    return output_of(f"resolve(*{arguments!r})", home, endpoint, offline).strip()


def test_a_hub_id_downloads_only_what_conversion_reads_and_is_cached(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    directory = Path(fetch(tmp_path, endpoint_of(hub), "org/tiny"))
    needed = set(FILES) - {"pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx"}
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == {name: FILES[name] for name in needed}
    assert hub.asked == needed  # type: ignore[attr-defined]
    assert repo_id_of(directory) == "org/tiny"
    assert fetch(tmp_path, NOWHERE, "org/tiny", offline=True) == str(directory)
    assert fetch(tmp_path, NOWHERE, "org/tiny") == str(directory)


def test_a_revision_is_passed_on(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert Path(fetch(tmp_path, endpoint_of(hub), "org/tiny", "v1.0")).name == COMMIT
    assert fetch(tmp_path, endpoint_of(hub), "org/tiny", "no-such") == (
        "refused: org/tiny: the hub has no revision 'no-such' of it"
    )


@pytest.mark.parametrize(
    ("repo", "told"), [("gated/model", "gated: accept its terms"), ("absent/model", "no such public model on the hub")]
)
def test_refusals_of_the_hub_are_one_line(hub: ThreadingHTTPServer, tmp_path: Path, repo: str, told: str) -> None:
    answer = fetch(tmp_path, endpoint_of(hub), repo)
    assert answer.startswith(f"refused: {repo}: ")
    assert told in answer
    assert "\n" not in answer


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub_is_one_line(tmp_path: Path, offline: bool) -> None:
    answer = fetch(tmp_path, NOWHERE, "org/tiny", offline=offline)
    assert answer == "refused: org/tiny: no such directory, not in the hub's cache, and the hub cannot be reached"


def test_a_local_directory_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert repo_id_of(tmp_path) is None
    with pytest.raises(QuantkitError, match="a revision applies to a hub id"):
        resolve(str(tmp_path), "main")


@pytest.mark.parametrize("name", ["no-such-directory", "a/b/c", "../elsewhere", "/no/such/place", "org/na me", ""])
def test_what_is_neither_is_refused_without_asking_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QuantkitError, match="no such directory, and not a hub id"):
        resolve(name)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(QuantkitError, match="a checkpoint is the directory"):
        resolve(str(tmp_path / "model.safetensors"))
