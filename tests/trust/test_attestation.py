"""Statements of how a file was made: written, checked, and found out when they are not true."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINYLM
from support.conversion import convert
from support.program import call, refusal

from quantkit.pipeline.execute import execute
from quantkit.pipeline.run import plan
from quantkit.sources.source import GGUFSource
from quantkit.trust.attestation import BUILD, PREDICATE
from quantkit.trust.digest import file_digests, model_digests

requires_in_toto = pytest.mark.skipif(
    importlib.util.find_spec("in_toto_attestation") is None, reason="in-toto-attestation (quantkit[attest]) is missing"
)
requires_signing = pytest.mark.skipif(
    importlib.util.find_spec("model_signing") is None, reason="model-signing, which signs, is not installed"
)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A source, its quantization, and the statement about it."""
    source = convert(TINYLM, tmp_path / "tinylm-F16.gguf", "f16")
    path = tmp_path / "tinylm-Q4_0.gguf"
    execute(GGUFSource(source), [(plan(source, "Q4_0"), path)])
    call("attest", path, "--source", source)
    return source, path, tmp_path / "tinylm-Q4_0.gguf.intoto.json"


@requires_in_toto
def test_a_statement_holds(made: tuple[Path, Path, Path]) -> None:
    source, path, statement = made
    said = json.loads(statement.read_text())
    assert said["_type"] == "https://in-toto.io/Statement/v1" and said["predicateType"] == PREDICATE
    (subject,) = said["subject"]
    assert subject["digest"]["sha256"] == file_digests([path])[path] and subject["name"] == path.name
    assert subject["annotations"]["model"] == model_digests(GGUFSource(path)).model
    definition = said["predicate"]["buildDefinition"]
    assert definition["buildType"] == BUILD
    (dependency,) = definition["resolvedDependencies"]
    assert dependency == {"name": source.name, "digest": {"sha256": file_digests([source])[source]}}
    assert definition["internalParameters"]["versions"]["numba"]
    assert call("attest", path, "--source", source, "--check", statement).stdout.endswith(f"{statement}: holds\n")


@requires_in_toto
def test_a_checkpoint_is_named_file_by_file(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    statement = tmp_path / "s.json"
    call("attest", made[1], "--source", TINYLM, "-o", statement)
    definition = json.loads(statement.read_text())["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["outtype"] in ("F16", "BF16")
    names = {entry["name"] for entry in definition["resolvedDependencies"]}
    assert {"config.json", "tokenizer.json"} < names and any(name.endswith(".safetensors") for name in names)


def change(statement: dict[str, Any], what: str) -> None:
    definition = statement["predicate"]["buildDefinition"]
    if what == "subject":
        statement["subject"][0]["digest"]["sha256"] = "0" * 64
    elif what == "source":
        definition["resolvedDependencies"][0]["digest"]["sha256"] = "0" * 64
    elif what == "types":
        definition["externalParameters"]["types"]["output_norm.weight"] = "Q8_0"
    else:
        definition["resolvedDependencies"].append({"name": "more.json", "digest": {"sha256": "0" * 64}})


@requires_in_toto
@pytest.mark.parametrize("what", ["subject", "source", "types", "more"])
def test_what_is_not_true_does_not_hold(made: tuple[Path, Path, Path], what: str) -> None:
    source, path, statement = made
    said = json.loads(statement.read_text())
    change(said, what)
    statement.write_text(json.dumps(said))
    data = json.loads(call("attest", path, "--source", source, "--check", statement, "--json", code=1).stdout)
    assert not data["holds"] and len(data["problems"]) == 1 and data["derivation"]["exact"]


@requires_in_toto
def test_what_is_not_exact_is_not_attested(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, path, _ = made
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    assert "nothing to attest" in refusal("attest", bad, "--source", source)
    assert not (tmp_path / "bad.gguf.intoto.json").exists()


@requires_in_toto
@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"_type": 5}', '{"_type": "https://in-toto.io/Statement/v1", "subject": [{}]}', "[" * 100_000,
     '{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"a","digest":{"sha256":"0"}}],'
     '"predicateType":"x","predicate":{"buildDefinition":7}}'],
)  # fmt: skip
def test_files_that_are_no_statements(made: tuple[Path, Path, Path], text: str) -> None:
    made[2].write_text(text)
    assert refusal("attest", made[1], "--source", made[0], "--check", made[2])


@requires_in_toto
@requires_signing
def test_signed_with_a_local_key(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The commands that the README shows: an elliptic key, model-signing over the folder that is published."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder, key = tmp_path / "published", ec.generate_private_key(ec.SECP256R1())
    folder.mkdir()
    for path in made[1:]:
        (folder / path.name).write_bytes(path.read_bytes())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (tmp_path / "key").write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    public = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(public)

    def signing(*args: object) -> int:
        done = subprocess.run([sys.executable, "-m", "model_signing", *map(str, args)], capture_output=True, text=True)
        return done.returncode

    signature = tmp_path / "model.sig"
    keys = ["--signature", signature, "--public_key", tmp_path / "key.pub"]
    assert signing("sign", "key", folder, "--signature", signature, "--private_key", tmp_path / "key") == 0
    assert signing("verify", "key", folder, *keys) == 0
    (folder / made[2].name).write_text("another statement")
    assert signing("verify", "key", folder, *keys) != 0
