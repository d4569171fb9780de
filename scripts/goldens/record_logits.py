"""Record what transformers computes for the tiny checkpoints of make_checkpoints.py: logits of a few positions.

    python scripts/goldens/record_logits.py [NAME ...]

Needs torch and transformers. Writes tests/goldens/logits/NAME.json: for texts of several lengths the logits of some
positions and every fifth token, in float32. Token i of a text is `tokens(length)[i]`. Of a multimodal wrapper
the text model alone is run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_checkpoints import FAMILIES, RECIPES, make_checkpoint

GOLDENS = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "logits"
STEP = 5
# More than the sliding windows (32) and than the contexts that rotary scaling starts from (64, 128), and less.
LENGTHS = (48, 200)


def tokens(length: int) -> np.ndarray:
    """The ids of a text of this length, int64 [length]; every checkpoint has more than 300 tokens."""
    i = np.arange(length)
    return (i * i * 7 + i * 31 + 3) % 300


def runnable(checkpoint: Path, scratch: Path) -> Path:
    """The checkpoint as transformers takes it: the text model alone, tied where it says so, with all its embeddings."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((checkpoint / "config.json").read_text())
    stored = {name: t for file in checkpoint.glob("*.safetensors") for name, t in load_file(file).items()}
    if "text_config" in config:
        config = config["text_config"]
        text = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(config["model_type"]))]
        config["architectures"] = [text.__name__]
        prefix = "language_model."
        stored = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    if config.get("tie_word_embeddings"):
        stored.pop("lm_head.weight", None)
    embedding = next(
        t
        for name, t in stored.items()
        if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "embeddings.weight"))
    )
    config["vocab_size"] = embedding.shape[0]
    made = scratch / f"{checkpoint.name}-runnable"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config))
    save_file(stored, made / "model.safetensors", metadata={"format": "pt"})
    return made


def record(checkpoint: Path) -> dict[str, Any]:
    """Logits of some positions of each text."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    longest = getattr(model.config, "n_positions", None) or max(LENGTHS)
    texts = []
    for length in LENGTHS:
        length = min(length, longest)
        positions = [0, length // 2, length - 1]
        ids = torch.from_numpy(tokens(length))
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float().numpy()
        texts.append(
            {
                "length": length,
                "positions": positions,
                "logits": [[float(f"{x:.7g}") for x in logits[at, ::STEP]] for at in positions],
            }
        )
    return {"texts": texts}


def main() -> None:
    """Record the checkpoints named, or all."""
    import torch
    import transformers

    torch.set_num_threads(1)
    GOLDENS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for recipe in sys.argv[1:] or RECIPES | FAMILIES:
            checkpoint = runnable(make_checkpoint(recipe, scratch), scratch)
            made = {"transformers": transformers.__version__, **record(checkpoint)}
            text = json.dumps(made).replace('"logits": [[', '"logits": [\n[').replace("], [", "],\n[")
            (GOLDENS / f"{recipe}.json").write_text(text + "\n", encoding="utf-8")
            print(recipe)


if __name__ == "__main__":
    main()
