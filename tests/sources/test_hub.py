"""Hub ids, with the real huggingface_hub against a small hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from support.local_hub import COMMIT, NOWHERE, TinyHub, endpoint_of, output_of, serve
from support.tiny import FAMILIES as TINY
from support.tiny import write_gguf

from quantkit.errors import QuantkitError
from quantkit.formats.gguf import GGUFFile
from quantkit.sources.hub import gguf_of, repo_id_of, resolve

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


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    with serve(TinyHub, files=FILES, asked=set()) as server:
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


GGUF_FILES = {
    "Tiny-Q8_0.gguf": b"eight",
    "Tiny-q4_k_m.gguf": b"four",
    "Tiny-Q4_K_S.gguf": b"small",
    "mmproj-Tiny-Q8_0.gguf": b"eyes",
    "Tiny-imatrix-Q8_0.gguf": b"weights",
    "BF16/Tiny-BF16-00001-of-00002.gguf": b"one",
    "BF16/Tiny-BF16-00002-of-00002.gguf": b"two",
    "Tiny.IQ2_XXS.gguf": b"two bits",
    "Other-IQ2_XXS.gguf": b"two more",
    "README.md": b"# A model\n",
}


@pytest.mark.parametrize(
    ("name", "file", "asked"),
    [
        ("Q8_0", "Tiny-Q8_0.gguf", ["Tiny-Q8_0.gguf"]),
        ("q8_0", "Tiny-Q8_0.gguf", ["Tiny-Q8_0.gguf"]),
        ("Q4_K_M", "Tiny-q4_k_m.gguf", ["Tiny-q4_k_m.gguf"]),
        ("BF16", "Tiny-BF16-00001-of-00002.gguf", [name for name in GGUF_FILES if "BF16" in name]),
        ("Other-IQ2_XXS.gguf", "Other-IQ2_XXS.gguf", ["Other-IQ2_XXS.gguf"]),
    ],
)
def test_a_gguf_file_on_the_hub_is_fetched_alone(tmp_path: Path, name: str, file: str, asked: list[str]) -> None:
    with serve(TinyHub, files=GGUF_FILES, asked=set()) as server:
        path = Path(output_of(f"gguf_of('org/tiny:{name}')", tmp_path, endpoint_of(server)).strip())
        assert path.name == file and path.is_file()
        assert server.asked == set(asked)
    assert output_of(f"gguf_of('org/tiny:{name}')", tmp_path, NOWHERE, offline=True).strip() == str(path)


def test_a_gguf_file_on_the_hub_is_a_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "Tiny-F32.gguf", TINY["qwen2"].metadata(), TINY["qwen2"].weights(1))
    with serve(TinyHub, files={path.name: path.read_bytes()}, asked=set()) as server:
        call = "len(__import__('quantkit').open_model('org/tiny:f32').tensors)"
        assert output_of(call, tmp_path / "home", endpoint_of(server)) == str(len(GGUFFile(path).tensors))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Q2_K", "it holds no GGUF file of the type or name 'Q2_K'"),
        (
            "IQ2_XXS",
            "several GGUF files are IQ2_XXS: Other-IQ2_XXS.gguf, Tiny.IQ2_XXS.gguf; name one: org/tiny:FILE.gguf",
        ),
    ],
)
def test_no_or_several_gguf_files_on_the_hub(tmp_path: Path, name: str, told: str) -> None:
    with serve(TinyHub, files=GGUF_FILES, asked=set()) as server:
        assert (
            output_of(f"gguf_of('org/tiny:{name}')", tmp_path, endpoint_of(server)).strip()
            == f"refused: org/tiny: {told}"
        )


@pytest.mark.parametrize("name", ["org/tiny", "./org:Q8_0", "a:b", "org/tiny:", "org/tiny:../../secret", "C:/x.gguf"])
def test_names_of_another_form_are_no_gguf_files_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert gguf_of(name) is None


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
