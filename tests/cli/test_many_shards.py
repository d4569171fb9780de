"""Models of more shards than files may be open at once, read and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.limits import limited
from support.program import call

from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import GGUFFile, Metadata, TensorInfo, ValueType
from quantkit.formats.output import GGUFOutput
from quantkit.sources.source import GGUFSource

resource = pytest.importorskip("resource")

N_SHARDS, OPEN_FILES = 300, 256


def shards(prefix: Path) -> list[Path]:
    return sorted(prefix.parent.glob(f"{prefix.name}-*-of-*.gguf"))


def test_gguf_shards(tmp_path: Path) -> None:
    metadata = Metadata()
    metadata.set("general.architecture", ValueType.STRING, "llama")
    metadata.set("llama.block_count", ValueType.UINT32, N_SHARDS)
    infos = [TensorInfo(f"blk.{i}.ffn_down.weight", (256, 4), GGMLType.F32) for i in range(N_SHARDS)]
    whole = tmp_path / "model-F32.gguf"
    rng = np.random.default_rng(0)
    with GGUFOutput(whole, metadata, infos) as output:
        for info in infos:
            output.write(rng.standard_normal((info.n_rows, info.n_per_row), np.float32))
    with limited(resource.RLIMIT_NOFILE, OPEN_FILES):
        call("split", whole, "--split-max-tensors", 1, "-o", tmp_path / "part")
        first = shards(tmp_path / "part")[0]
        call("merge", first, "-o", tmp_path / "again.gguf")
        call("quantize", first, "--type", "Q8_0", "--keep-split", "-o", tmp_path / "small")
        call("quantize", whole, "--type", "Q8_0", "-o", tmp_path / "small.gguf")
        assert f"{N_SHARDS} shards" in call("inspect", first).stdout
    assert (tmp_path / "again.gguf").read_bytes() == whole.read_bytes()
    assert len(shards(tmp_path / "part")) == len(shards(tmp_path / "small")) == N_SHARDS
    small, one = GGUFSource(shards(tmp_path / "small")[0]), GGUFFile(tmp_path / "small.gguf")
    for name in one.tensors:
        np.testing.assert_array_equal(small.read(name), one.read(name))
