"""What the tests of all families share: which of the tiny checkpoints can be evaluated, and what is known to differ."""

from __future__ import annotations

from family_recipes import OWN_CODE
from make_checkpoints import FAMILIES, RECIPES

from quantkit.architectures import supported

_CLASSES = {name for row in supported() if row.evaluated for name in row.classes}


# Those whose class is of a family that is not evaluated, and whose hyper-parameters make them one that is.
_OF_ANOTHER_FAMILY = {"tiny-granite-micro"}
# Those that end with a classifier: they give texts scores, and neither vectors nor logits.
CLASSIFIERS = [name for name in FAMILIES if "classifier" in name or "reranker" in name]
# The checkpoints that have a forward pass here, and those of them that transformers has one for.
EVALUATED = [
    name
    for name, recipe in (RECIPES | FAMILIES).items()
    if (recipe.config["architectures"][0] in _CLASSES or name in _OF_ANOTHER_FAMILY) and name not in CLASSIFIERS
]
# Those without logits: they give vectors.
ENCODERS = [name for name in FAMILIES if "bert" in name or "t5" in name]
# Those of wrappers whose text model transformers does not run by itself: their forward passes are other families'.
_WITHIN_WRAPPERS = {
    "tiny-smolvlm", "tiny-qwen2-vl", "tiny-qwen3-vl", "tiny-qwen3-vl-moe", "tiny-qwen25-omni", "tiny-qwen3-omni",
    "tiny-qwen3-asr", "tiny-gemma4-unified",
}  # fmt: skip
_NO_LOGITS = _WITHIN_WRAPPERS | set(ENCODERS)
IN_TRANSFORMERS = [name for name in EVALUATED if name not in OWN_CODE and name not in _NO_LOGITS]
# Those that the pinned llama.cpp does not load, and those that it runs otherwise than the model is meant to be run.
LLAMA_CPP_LACKS = {"tiny-deepseek-v2-lite": "llama.cpp knows DeepSeek V2 without a latent of queries by its layers"}
LLAMA_CPP_RUNS = [name for name in FAMILIES if name not in LLAMA_CPP_LACKS]
_DEVIATION = "llama.cpp divides the squares of a sparse gate by one less than their number"
LLAMA_CPP_DIFFERS = LLAMA_CPP_LACKS | {
    "tiny-gemma3n": _DEVIATION,
    "tiny-gemma3n-deep": _DEVIATION,
    **dict.fromkeys(ENCODERS, "there are no logits of encoders"),
    "tiny-exaone4-window": "llama.cpp knows the models with a window by their 64 layers",
    "tiny-phimoe": "llama.cpp takes the norms for RMS norms, and chooses experts otherwise",
    "tiny-qwen2-vl": "llama.cpp does not read the epsilon of this family's norms",
    "tiny-qwen25-omni": "llama.cpp does not read the epsilon of this family's norms",
    "tiny-gpt-oss-mxfp4": "llama.cpp rounds what it multiplies with MXFP4 weights to 8 bits",
}
# Those with more than plain attention in and between their layers.
OTHER_MIXERS = [
    "tiny-gemma3n",
    "tiny-gemma3n-deep",
    "tiny-gemma4",
    "tiny-gemma4-moe",
    "tiny-gemma4-unified",
    "tiny-rwkv7",
    "tiny-deepseek-v2",
    "tiny-deepseek-v2-lite",
    "tiny-deepseek-v3",
    "tiny-lfm2",
    "tiny-lfm2-moe",
    "tiny-qwen3-next",
    "tiny-qwen35",
    "tiny-qwen35-moe",
    "tiny-granite-hybrid",
    "tiny-mamba",
    "tiny-mamba2",
    "tiny-falcon-mamba",
    "tiny-falcon-h1",
    "tiny-jamba",
    "tiny-nemotron-h",
    "tiny-nemotron-h-moe",
]
