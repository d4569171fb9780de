"""Record what transformers computes for the tiny encoders of make_checkpoints.py: pooled vectors of a few texts.

    python scripts/goldens/record_embeddings.py NAME ...

Needs torch and transformers. Writes tests/goldens/embeddings/NAME.json: for texts of several lengths the mean of the
last layer's vectors, that of the first token and that of the last, in float32. Token i of a text is
`tokens(length)[i]`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import record_logits
from make_checkpoints import make_checkpoint

GOLDENS = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "embeddings"
LENGTHS = (5, 48, 200)


def tokens(length: int) -> np.ndarray:
    """The ids of a text of this length, int64 [length]: none of padding, from which RoBERTa counts positions."""
    ids = record_logits.tokens(length)
    return np.where(ids < 5, ids + 5, ids)


def record(checkpoint: Path) -> dict[str, Any]:
    """The vectors of each text."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    texts = []
    for length in LENGTHS:
        with torch.no_grad():
            hidden = model(input_ids=torch.from_numpy(tokens(length))[None]).last_hidden_state[0].float().numpy()
        vectors = {"mean": hidden.mean(axis=0), "cls": hidden[0], "last": hidden[-1]}
        texts.append({"length": length} | {key: [float(f"{x:.7g}") for x in vector] for key, vector in vectors.items()})
    return {"texts": texts}


def main() -> None:
    """Record the checkpoints named."""
    import torch
    import transformers

    torch.set_num_threads(1)
    GOLDENS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for recipe in sys.argv[1:]:
            made = {"transformers": transformers.__version__, **record(make_checkpoint(recipe, Path(name)))}
            text = json.dumps(made).replace(', "mean"', ',\n"mean"').replace(', "cls"', ',\n"cls"')
            (GOLDENS / f"{recipe}.json").write_text(text.replace(', "last"', ',\n"last"') + "\n", encoding="utf-8")
            print(recipe)


if __name__ == "__main__":
    main()
