"""The forward pass of each family's tiny checkpoint against what transformers computes (record_logits.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from make_checkpoints import make_checkpoint
from record_logits import GOLDENS, STEP, tokens
from support.families import IN_TRANSFORMERS
from support.tiny import relative_error

from quantkit.evaluate.settings import Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.sources.checkpoint import CheckpointSource

# What llama.cpp, and so we, compute otherwise than transformers, and the error that comes of it.
DIFFERENT = {
    "tiny-yarn": (2e-2, "llama.cpp does not read YaRN's attention_factor; here it is not the one that follows"),
    "tiny-gemma3": (2e-3, "the reference converter adds one to norms in their own type, here F16"),
    "tiny-pythia": (1e-3, "llama.cpp's GELU is the tanh approximation, this model's is exact"),
    "tiny-falcon": (1e-3, "llama.cpp's GELU is the tanh approximation, this model's is exact"),
    "tiny-falcon-mamba": (
        2e-2,
        "llama.cpp has one epsilon, this model another for what a state space selects",
    ),
    "tiny-gpt-oss": (5e-2, "llama.cpp rounds the bounds of YaRN's ramp to whole dimensions, gpt-oss does not"),
}
# Positions from which on llama.cpp differs: it has no sliding window for this family.
WINDOW = {"tiny-mistral": 128}


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_logits_equal_those_of_transformers(tmp_path, name):
    golden = json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))
    model = Transformer(CheckpointSource(make_checkpoint(name, tmp_path), "f32"), Compute(threads=1))
    for text in golden["texts"]:
        logits = model.logits(tokens(text["length"])[None].astype(np.int32))[0]
        expected = np.array(text["logits"])
        positions = [at for at in text["positions"] if at < WINDOW.get(name, text["length"])]
        ours = logits[positions][:, : expected.shape[1] * STEP : STEP]
        bound, _ = DIFFERENT.get(name, (2e-5, ""))
        assert relative_error(ours, expected[: len(positions), : ours.shape[1]]) < bound
