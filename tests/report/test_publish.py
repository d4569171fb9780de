"""Publishing with the real client to a hub on this machine, which keeps what it is sent; and what is beside files."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from conftest import ROOT, TINYLM
from support.conversion import convert
from support.local_hub import NOWHERE, Hub, endpoint_of, serve

from quantkit.errors import QuantkitError
from quantkit.report import export
from quantkit.report.lint import hub_label, lint
from quantkit.report.publish import contents, git_blob
from quantkit.sources.source import GGUFSource, open_model


class Uploads(Hub):
    """The part of the hub's interface that uploading a folder uses. The server has `files`, `blobs` and `calls`."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: object, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status, Content_Type="application/json")

    def do_GET(self) -> None:
        self.server.calls.append(("GET", self.path))
        if self.path.startswith("/api/models/me/tiny"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": "me/tiny", "sha": "0" * 40, "siblings": siblings, "private": False, "tags": []})
        else:
            self._json({"error": "not here"}, 404)

    def do_POST(self) -> None:
        body = self._body()
        self.server.calls.append(("POST", self.path))
        if self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self._json({"url": f"{endpoint_of(self.server)}/me/tiny", "name": "me/tiny", "id": "1"})
        elif self.path.startswith("/api/models/me/tiny/branch/"):
            self._json({})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".gguf") else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in asked
            ]  # fmt: skip
            self._json({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._json({"transfer": "basic", "objects": [self._transfer(o) for o in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = ("blob", base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = ("lfs", self.server.blobs[value["oid"]])
            self._json(
                {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"{endpoint_of(self.server)}/me/tiny/commit/{'1' * 40}",
                }
            )
        elif "/paths-info/" in self.path:
            wanted = parse_qs(body.decode())["paths"]
            self._json([self._info(name) for name in wanted if name in self.server.files])
        elif self.path.startswith("/api/collections/"):
            when = "2026-01-01T00:00:00.000Z"
            self._json(
                {"slug": "me/all-1", "title": "all", "items": [], "owner": {"name": "me"}, "lastUpdated": when,
                 "position": 0, "private": False, "theme": "blue", "upvotes": 0}
            )  # fmt: skip
        else:
            self._json({"error": f"no {self.path}"}, 404)

    def _transfer(self, one: dict) -> dict:
        if one["oid"] in self.server.blobs:
            return one
        return {**one, "actions": {"upload": {"href": f"{endpoint_of(self.server)}/blob/{one['oid']}"}}}

    def do_PUT(self) -> None:
        self.server.calls.append(("PUT", self.path))
        data = self._body()
        if self.server.refuse_after is not None and len(self.server.blobs) >= self.server.refuse_after:
            self._json({"error": "storage is full"}, 413)
            return
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self.answer(b"", ETag='"x"')

    def _info(self, name: str) -> dict:
        kind, data = self.server.files[name]
        if name == self.server.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found = {"type": "file", "path": name, "size": len(data), "oid": blob}
        if kind == "lfs":
            sha = hashlib.sha256(data).hexdigest()
            found["lfs"] = {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 130}
        return found


def hub(**changes):
    return serve(Uploads, **{"files": {}, "blobs": {}, "calls": [], "refuse_after": None, "damaged": None, **changes})


def publish(directory: Path, endpoint: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HOME": str(directory.parent / "home"),
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "quantkit", "publish", str(directory), "me/tiny", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def directory(tmp_path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    convert(TINYLM, made / "tinylm-F32.gguf", "f32")
    (made / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (made / "report.json").write_text("{}\n")
    (made / "secret.txt").write_text("stays at home")
    (made / ".quantkit").mkdir()
    (made / ".quantkit" / "report.json").write_text("{}")
    return made


def test_published_whole_and_not_twice(directory):
    with hub() as server:
        done = publish(directory, endpoint_of(server))
        assert done.returncode == 0, done.stderr
        assert set(server.files) - {".gitattributes"} == {"tinylm-F32.gguf", "README.md", "report.json"}
        assert server.files["tinylm-F32.gguf"] == ("lfs", (directory / "tinylm-F32.gguf").read_bytes())
        sent = [call for call in server.calls if call[0] == "PUT"]
        assert len(sent) == 1
        again = publish(directory, endpoint_of(server), "--revision", "second", "--collection", "me/all-1")
        assert again.returncode == 0, again.stderr
        assert [call for call in server.calls if call[0] == "PUT"] == sent
        assert any("/branch/second" in path for _, path in server.calls)
        assert any(path.startswith("/api/collections/me/all-1") for _, path in server.calls)


def test_what_arrived_is_compared(directory):
    with hub(damaged="tinylm-F32.gguf") as server:
        done = publish(directory, endpoint_of(server))
    assert done.returncode == 1 and "tinylm-F32.gguf has another hash there" in done.stderr


def test_refusals_are_one_line(directory):
    with hub(refuse_after=0) as server:
        done = publish(directory, endpoint_of(server))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "me/tiny" in done.stderr.splitlines()[-1]
    gone = publish(directory, NOWHERE)
    assert gone.returncode == 1 and "Traceback" not in gone.stderr and "me/tiny" in gone.stderr.splitlines()[-1]
    with pytest.raises(QuantkitError, match="no GGUF files"):
        contents(directory / ".quantkit")


def test_dry_run_sends_nothing(directory):
    done = publish(directory, NOWHERE, "--dry-run", "--json")
    told = json.loads(done.stdout)
    assert {each["path"] for each in told["files"]} == {"tinylm-F32.gguf", "README.md", "report.json"}


def test_git_names_files_as_git_does(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"some bytes\n" * 1000)
    named = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True).stdout.strip()
    assert git_blob(path) == named


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("model-Q4_K_M.gguf", "Q4_K_M"),
        ("model-q4_k_m.gguf", "Q4_K_M"),
        ("Q8_0/model-UD-IQ2_XXS-00001-of-00002.gguf", "UD-IQ2_XXS"),
        ("model-BF16-Q6_K.gguf", "Q6_K"),
        ("model-Q4_K_XL.gguf", "Q4_K_XL"),
        ("model.gguf", None),
    ],
)
def test_labels_of_the_hub(name, label):
    assert hub_label(name) == label


def levels(path: Path, source=None) -> list[str]:
    return [f"{each.level} {each.problem}" for each in lint(path, source)]


def test_lint(directory, tmp_path):
    assert not any(each.startswith("error") for each in levels(directory))
    wrong = directory / "tinylm-F32-Q8_0.gguf"
    (directory / "tinylm-F32.gguf").rename(wrong)
    found = levels(wrong, open_model(TINYLM))
    assert any("hub will show it as Q8_0" in each for each in found)
    elsewhere = wrong.rename(directory / "tinylm.f32.gguf")
    assert any("vLLM looks for *-F32.gguf" in each for each in levels(elsewhere))
    assert not any("template differs" in each for each in found)
    nameless = elsewhere.rename(directory / "tinylm.gguf")
    assert any(each.startswith("error the hub finds no type") for each in levels(nameless))
    shard = nameless.rename(directory / "tiny-F32-00001-of-00002.gguf")
    found = levels(directory)
    assert any("1 of 2 shards are missing: 2" in each for each in found)
    assert any("Ollama cannot pull shards" in each for each in found)
    shard.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(QuantkitError, match="no GGUF files"):
        lint(directory / ".quantkit")


def test_exports(directory):
    metadata = GGUFSource(directory / "tinylm-F32.gguf").metadata
    text = export.modelfile("tinylm-F32.gguf", metadata, system="Be brief.")
    assert text.startswith("FROM ./tinylm-F32.gguf\n") and 'SYSTEM """Be brief."""' in text
    eos = list(metadata.strings("tokenizer.ggml.tokens"))[metadata.integer("tokenizer.ggml.eos_token_id")]
    assert f"PARAMETER stop {json.dumps(eos)}" in text and "TEMPLATE" not in text
    files = export.hub_files(metadata, template="{{ .Prompt }}")
    assert json.loads(files["params"])["stop"] == [eos] and set(files) == {"params", "template"}
    with pytest.raises(QuantkitError, match="three quotes"):
        export.modelfile("x.gguf", metadata, system='"""')
    assert set(export.vllm_files(open_model(TINYLM))) >= {"config.json", "tokenizer.json"}
    with pytest.raises(QuantkitError, match="original checkpoint"):
        export.vllm_files(GGUFSource(directory / "tinylm-F32.gguf"))


def test_export_commands(directory):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "quantkit", "export", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert run("ollama", str(directory)).returncode == 0
    assert (directory / "Modelfile").read_text().startswith("FROM ./tinylm-F32.gguf")
    assert "exists" in run("ollama", str(directory)).stderr
    assert run("vllm", str(directory), "--source", str(TINYLM)).returncode == 0
    assert (directory / "config.json").read_bytes() == (TINYLM / "config.json").read_bytes()
    assert "--source" in run("vllm", str(directory)).stderr
    assert "no engine" in run("lmstudio", str(directory)).stderr
