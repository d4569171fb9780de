from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from conftest import TINYLM
from support.conversion import convert
from support.program import call
from support.tiny import tiny_metadata, tiny_weights, write_gguf

from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import ValueType
from quantkit.sources.source import GGUFSource, open_model
from quantkit.trust.digest import file_digests, model_digests


def test_metadata_order_and_split_do_not_count(tmp_path: Path) -> None:
    weights, metadata = tiny_weights(), tiny_metadata()
    first = model_digests(GGUFSource(write_gguf(tmp_path / "a.gguf", metadata, weights)))
    metadata.set("general.name", ValueType.STRING, "another")
    backward = dict(reversed(weights.items()))
    second = model_digests(GGUFSource(write_gguf(tmp_path / "b.gguf", metadata, backward)))
    assert first.model == second.model and first.tensors == second.tensors
    call("split", tmp_path / "b.gguf", "-o", tmp_path / "c", "--split-max-tensors", 4)
    assert model_digests(GGUFSource(next(tmp_path.glob("c-00001*")))).model == first.model


def test_names_shapes_types_and_bytes_count(tmp_path: Path) -> None:
    zeros = np.zeros((4, 32), np.float32)
    seen = set()
    for i, (name, shape, kind) in enumerate(
        [("a", (4, 32), GGMLType.F32), ("b", (4, 32), GGMLType.F32), ("a", (2, 64), GGMLType.F32),
         ("a", (4, 32), GGMLType.F16), ("a", (8, 16), GGMLType.F32)]
    ):  # fmt: skip
        path = write_gguf(tmp_path / f"{i}.gguf", tiny_metadata(), {name: zeros.reshape(shape)}, kind)
        seen.add(model_digests(GGUFSource(path)).model)
    assert len(seen) == 5


def test_a_tensors_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    weights = tiny_weights()
    path = write_gguf(tmp_path / "a.gguf", tiny_metadata(), weights)
    digests = json.loads(call("hash", path, "--json").stdout)
    for name, array in weights.items():
        assert digests["digests"][name] == hashlib.sha256(array.tobytes()).hexdigest()
    assert file_digests([path]) == {path: hashlib.sha256(path.read_bytes()).hexdigest()}
    lines = call("hash", path).stdout.splitlines()
    assert lines[-1] == f"{digests['digest']}  (model)" and len(lines) == len(weights) + 1
    assert call("hash", path, "--model-only").stdout == f"{digests['digest']}  {path}\n"


def test_a_checkpoint_has_the_digests_of_its_conversion(tmp_path: Path) -> None:
    converted = GGUFSource(convert(TINYLM, tmp_path / "tinylm.gguf", "auto"))
    assert model_digests(open_model(TINYLM)).model == model_digests(converted).model
