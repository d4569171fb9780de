"""Record what transformers computes for the tiny encoders of make_checkpoints.py: pooled vectors, or scores, of texts.

    python scripts/goldens/record_embeddings.py NAME ...

Needs torch and transformers. Writes tests/goldens/embeddings/NAME.json: for texts of several lengths the mean of the
last layer's vectors, that of the first token and that of the last, in float32. Token i of a text is
`tokens(length)[i]`. Of classifiers, and of rerankers that answer yes or no, the scores of these texts go into
tests/goldens/scores/NAME.json.
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
SCORES = GOLDENS.with_name("scores")
LENGTHS = (5, 48, 200)


def tokens(length: int) -> np.ndarray:
    """The ids of a text of this length, int64 [length]: none of padding, from which RoBERTa counts positions."""
    ids = record_logits.tokens(length)
    return np.where(ids < 5, ids + 5, ids)


def record(checkpoint: Path) -> dict[str, Any]:
    """The vectors of each text."""
    import torch
    from transformers import AutoModel, T5EncoderModel

    kind = T5EncoderModel if "t5" in checkpoint.name else AutoModel
    model = kind.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    texts = []
    for length in LENGTHS:
        with torch.no_grad():
            hidden = model(input_ids=torch.from_numpy(tokens(length))[None]).last_hidden_state[0].float().numpy()
        vectors = {"mean": hidden.mean(axis=0), "cls": hidden[0], "last": hidden[-1]}
        texts.append({"length": length} | {key: [float(f"{x:.7g}") for x in vector] for key, vector in vectors.items()})
    return {"texts": texts}


def record_scores(checkpoint: Path) -> dict[str, Any]:
    """The scores of each text: a classifier's, or the probabilities of the answers yes and no."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    answers = None
    if "reranker" in checkpoint.name and "roberta" not in checkpoint.name:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()
        added = json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]
        answers = [next(token["id"] for token in added if token["content"] == text) for text in ("yes", "no")]
    else:
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint, **options).eval()
    texts = []
    for length in LENGTHS:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens(length))[None]).logits[0]
        scores = logits if answers is None else logits[-1, answers].softmax(0)
        texts.append({"length": length, "scores": [float(f"{x:.7g}") for x in scores.tolist()]})
    return {"texts": texts}


def main() -> None:
    """Record the checkpoints named."""
    import torch
    import transformers

    torch.set_num_threads(1)
    for folder in (GOLDENS, SCORES):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for recipe in sys.argv[1:]:
            checkpoint = make_checkpoint(recipe, Path(name))
            if "classifier" in recipe or "reranker" in recipe:
                made = {"transformers": transformers.__version__, **record_scores(checkpoint)}
                (SCORES / f"{recipe}.json").write_text(json.dumps(made) + "\n", encoding="utf-8")
                print(recipe)
                continue
            made = {"transformers": transformers.__version__, **record(checkpoint)}
            text = json.dumps(made).replace(', "mean"', ',\n"mean"').replace(', "cls"', ',\n"cls"')
            (GOLDENS / f"{recipe}.json").write_text(text.replace(', "last"', ',\n"last"') + "\n", encoding="utf-8")
            print(recipe)


if __name__ == "__main__":
    main()
