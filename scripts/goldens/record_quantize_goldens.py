"""Record the sha256 of what llama-quantize writes, for every file type, with and without an importance matrix.

    python scripts/goldens/record_quantize_goldens.py MODEL-F16.gguf NAME

Writes tests/goldens/quantize/NAME.json: the source's sha256, and for each file type the result's, from the real
llama_model_quantize. The reference needs minutes for the small types; comparing with the record needs seconds.
The importance matrix is made up, the same everywhere: `importance` below.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.imatrix import Importance, ImportanceMatrix
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.pipeline.plan import plan_quantize
from quantkit.sources.source import GGUFSource, TensorSource

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "quantize"


def importance(source: TensorSource) -> ImportanceMatrix:
    """Uneven importance for every matrix but the embeddings, from the raw bits of a counter-based generator."""
    matrix = ImportanceMatrix(datasets=["made-up"], chunk_count=1, chunk_size=512)
    for name, info in source.tensors.items():
        if len(info.shape) > 1 and "token_embd" not in name:
            raw = np.random.Philox(zlib.crc32(name.encode())).random_raw(info.n_per_row)
            # Between 1/16 and 256, by powers of two, times up to 2: exact in float32 however it is computed.
            mantissa = 1 + (raw & 0xFFFF).astype(np.float32) / np.float32(65536)
            scale = np.exp2(((raw >> np.uint64(32)) % np.uint64(13)).astype(np.float32) - 4)
            matrix.entries[name] = Importance((mantissa * scale)[None], np.array([1]))
    return matrix


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main() -> None:
    """Run the reference for every file type and write the record."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.llama_reference import llama_quantize

    model, name = Path(sys.argv[1]), sys.argv[2]
    source = GGUFSource(model)
    matrix = importance(source)
    keys = [
        ("quantize.imatrix.dataset", 3, b"made-up"),
        ("quantize.imatrix.entries_count", 0, len(matrix.entries)),
        ("quantize.imatrix.chunks_count", 0, 1),
    ]
    path = GOLDENS / f"{name}.json"
    record: dict[str, Any] = {"source": sha256(model), "reference": "llama-cpp-python 0.3.36"}
    record |= {"plain": {}, "weighted": {}, "refused": []}
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8")))["source"] == record["source"]:
        record |= before  # go on after an interrupted run
    plain, weighted, refused = record["plain"], record["weighted"], record["refused"]
    GOLDENS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "out.gguf"
        for kind, file in FILE_TYPES.items():
            if kind in plain or kind in weighted or kind in refused:
                continue
            try:
                planned = plan_quantize(source, file)
            except QuantkitError:
                assert llama_quantize(model, target, kind) != 0
                refused.append(kind)
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                continue
            if not any(t.needs_weights for t in planned):
                assert llama_quantize(model, target, kind) == 0
                plain[kind] = sha256(target)
            if file.default.is_quantized:
                assert llama_quantize(model, target, kind, imatrix=matrix.weights(), kv_overrides=keys) == 0
                weighted[kind] = sha256(target)
            print(kind, plain.get(kind), weighted.get(kind), flush=True)
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
