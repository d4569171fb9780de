"""How much memory llama.cpp needs to run a model, and which type fits into the memory available.

Three parts, as llama.cpp prints them when it loads a file: the model's buffer, the key-value cache (and recurrent
states), and the compute buffer of one batch. The cache's sizes follow llama.cpp's rules exactly. The compute buffer is
the largest set of intermediate results that live at one time, worked out from the graph: the logits with two copies of
the activations, or a feed-forward block, or an attention block, with the mask of one batch. The CPU backend of the
pinned version agrees within a few per cent; a GPU backend may take some more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import plan_all
from quantkit.sources.source import GGUFSource, TensorSource

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
# The usual types to publish, from large to small: what `recommend` chooses from.
CHOICES = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M",
           "Q3_K_S", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")  # fmt: skip
_CELLS = 256  # llama.cpp rounds contexts up to a multiple of this
_LARGEST_CONTEXT = 1 << 28
_MOST_LAYERS, _MOST = 1 << 14, 1 << 26  # layers; heads, widths and windows
# Where the metadata gives a window but no pattern: every n-th layer attends to everything. True: the first of the n.
_PATTERNS = {
    "gemma2": (2, False), "gemma3": (6, False), "gemma3n": (5, False), "gemma-embedding": (6, False),
    "cohere2": (4, False), "cohere2moe": (4, True), "exaone4": (4, False), "exaone-moe": (4, False),
    "gpt-oss": (2, False), "llama4": (4, False), "olmo2": (4, False), "plamo3": (8, False), "afmoe": (4, False),
    "smallthinker": (4, True), "modern-bert": (3, True), "phi3": (1, False), "mellum": (4, False),
}  # fmt: skip
_RECURRENT = re.compile(r"\.(ssm_\w+|time_mix_\w+|shortconv\.\w+)\.")
_ATTENTION = re.compile(r"\.(attn_k|attn_qkv|attn_kv_a_mqa|attn_k_b)\.weight$")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes needed to run a model: its weights, its key-value cache for `n_ctx` tokens, and compute buffers."""

    weights: int
    cache: int
    compute: int
    n_ctx: int

    def as_dict(self) -> dict[str, int]:
        """The parts and their sum, in bytes, for programs."""
        parts = {"weights": self.weights, "cache": self.cache, "compute": self.compute}
        return {**parts, "total": self.total, "n_ctx": self.n_ctx}

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.compute


@dataclass(frozen=True)
class Choice:
    """A file or a type to choose, and what running it takes."""

    name: str
    size: int
    need: MemoryNeed
    fits: bool


@dataclass(frozen=True)
class Recommendation:
    """`best` is the largest choice that fits into `memory` bytes; `above` would not, `below` leaves more free."""

    memory: int
    choices: Sequence[Choice]

    @property
    def best(self) -> Choice | None:
        """The largest that fits, None when nothing does."""
        return next((choice for choice in self.choices if choice.fits), None)

    @property
    def above(self) -> Choice | None:
        """The next larger one, which does not fit."""
        too_large = [choice for choice in self.choices if not choice.fits]
        return too_large[-1] if too_large else None

    @property
    def below(self) -> Choice | None:
        """The next smaller one."""
        fitting = [choice for choice in self.choices if choice.fits]
        return fitting[1] if len(fitting) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        """The choices for programs, from large to small."""
        each = [{"name": c.name, "size": c.size, "fits": c.fits, "memory": c.need.as_dict()} for c in self.choices]
        best = None if self.best is None else self.best.name
        return {"memory": self.memory, "best": best, "choices": each}


class _Reader:
    """The hyper-parameters needed here, each checked when it is read."""

    def __init__(self, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> None:
        self.arch, self._metadata, self.tensors = metadata.architecture, metadata, tensors
        self.n_blocks = self.integer("block_count", high=_MOST_LAYERS)
        # Blocks for predicting several tokens at once come last, and are not run.
        self.n_layer = max(0, self.n_blocks - self.integer("nextn_predict_layers", high=_MOST_LAYERS))

    def integer(self, key: str, default: int = 0, high: int = _MOST) -> int:
        """The whole number `key` of this architecture."""
        return self._metadata.integer(f"{self.arch}.{key}", 0, high, default)

    def per_layer(self, key: str, default: int) -> list[int]:
        """The whole number `key` of each layer, which may be one for all."""
        full = f"{self.arch}.{key}"
        if self._metadata.is_array(full):
            return self._metadata.integers(full, self.n_blocks, 0, _MOST)[: self.n_layer]
        return [self.integer(key, default)] * self.n_layer

    def windowed(self) -> list[bool]:
        """Which layers use a sliding window."""
        if not self.integer("attention.sliding_window", 0):
            return [False] * self.n_layer
        full = f"{self.arch}.attention.sliding_window_pattern"
        if self._metadata.is_array(full):
            flags = [bool(each) for each in self._metadata[full].value][: self.n_layer]
            return flags + [False] * (self.n_layer - len(flags))
        period, dense_first = _PATTERNS.get(self.arch, (0, False))
        period = self.integer("attention.sliding_window_pattern", period, _MOST_LAYERS)
        if period == 0:
            return [False] * self.n_layer
        attends_to_all = 0 if dense_first else period - 1
        return [i % period != attends_to_all for i in range(self.n_layer)]

    def layers_with(self, pattern: re.Pattern[str]) -> set[int]:
        """The layers that hold a tensor whose name `pattern` finds."""
        found = set()
        for name in self.tensors:
            match = re.match(r"blk\.(\d{1,6})\.", name)
            if match and pattern.search(name) and int(match[1]) < self.n_layer:
                found.add(int(match[1]))
        return found


def memory_needed(
    metadata: Metadata,
    tensors: Mapping[str, TensorInfo],
    *,
    n_ctx: int = 8192,
    kv: str = "f16",
    flash_attention: bool = True,
    n_ubatch: int = 512,
    n_seq: int = 1,
) -> MemoryNeed:
    """What llama.cpp allocates for a model with this metadata and these tensors.

    `kv` is the type of keys and values in the cache. `n_ubatch` is how many tokens are computed together, `n_seq` how
    many sequences share the context. Raises QuantkitError for invalid metadata and unknown cache types.
    """
    if kv.lower() not in KV_TYPES:
        raise QuantkitError(f"unknown cache type {kv!r}: use one of {', '.join(KV_TYPES)}")
    if not 0 < n_ctx <= _LARGEST_CONTEXT:
        raise QuantkitError(f"a context of {n_ctx} tokens: use 1 to {_LARGEST_CONTEXT}")
    kind, r = GGMLType.parse(kv), _Reader(metadata, tensors)
    n_ctx = -(-n_ctx // _CELLS) * _CELLS
    n_ubatch = min(n_ubatch, n_ctx)
    n_embd = r.integer("embedding_length", 0)
    n_head = max(r.per_layer("attention.head_count", 0), default=0)
    kv_heads = r.per_layer("attention.head_count_kv", n_head)
    head_k = r.integer("attention.key_length", n_embd // n_head if n_head else 0)
    head_v = r.integer("attention.value_length", n_embd // n_head if n_head else 0)
    latent = bool(r.integer("attention.key_length_mla", 0))  # one latent vector per token, keys and values at once
    window = r.integer("attention.sliding_window", 0)
    short = min(n_ctx, -(-(min(n_ctx, window * n_seq + n_ubatch)) // _CELLS) * _CELLS)

    attending, windowed = r.layers_with(_ATTENTION), r.windowed()
    cache = 0
    for i in sorted(attending):
        cells = short if windowed[i] else n_ctx
        widths = [kv_heads[i] * head_k] + ([] if latent else [kv_heads[i] * head_v])
        cache += cells * sum(_row(kind, width) for width in widths)
    recurrent = len(r.layers_with(_RECURRENT))
    cache += recurrent * n_seq * 4 * sum(_state(r, n_embd, n_head))

    unit = 4 * n_ubatch  # a column of a batch's activations, float32
    n_vocab = max((tensors[n].n_rows for n in ("output.weight", "token_embd.weight") if n in tensors), default=0)
    mask = n_ctx * n_ubatch * (2 if flash_attention else 4) if attending else 0
    mixed = n_head * head_k + n_head * head_v + max(kv_heads, default=0) * (head_k + head_v)
    scores = 0 if flash_attention or not attending else n_ctx * n_head
    compute = max(
        (n_vocab + 2 * n_embd) * unit,
        mask + _feed_forward(r, n_embd) * unit,
        mask + (mixed + n_embd + scores) * unit,
    )
    return MemoryNeed(sum(info.nbytes for info in tensors.values()), cache, compute, n_ctx)


def _feed_forward(r: _Reader, n_embd: int) -> int:
    """Numbers a token that a feed-forward block holds at its widest moment, its input and output among them."""
    widest, gated, mixed = max(r.per_layer("feed_forward_length", 0), default=0), False, 0
    dense = any(re.search(r"\.ffn_up\.weight$", name) for name in r.tensors)
    for name, info in r.tensors.items():
        gated |= name.endswith(".ffn_gate.weight") or (name.endswith(".ffn_up.weight") and info.n_rows >= 2 * widest)
    if used := r.integer("expert_used_count"):
        mixed = used * (2 * r.integer("expert_feed_forward_length", widest) + n_embd) + 2 * n_embd
    plain = (3 * widest + 4 * n_embd if gated else 2 * widest + 2 * n_embd) if dense else 0
    return max(plain, mixed)


def _row(kind: GGMLType, width: int) -> int:
    if width % kind.block_size:
        raise QuantkitError(
            f"keys and values of {width} numbers per token do not fit {kind.name}'s blocks of {kind.block_size}: "
            "choose f16 for the cache"
        )
    return kind.row_nbytes(width)


def _state(r: _Reader, n_embd: int, n_head: int) -> tuple[int, int]:
    """Numbers that a recurrent layer remembers for a sequence: of its convolution, and of its state."""
    if wkv := r.integer("wkv.head_size", 0):
        return r.integer("token_shift_count", 2) * n_embd, n_embd * wkv
    if shortconv := r.integer("shortconv.l_cache", 0):
        return n_embd * (shortconv - 1), 0
    if kda := r.integer("kda.head_dim", 0):
        return 3 * (max(1, r.integer("ssm.conv_kernel", 4)) - 1) * n_head * kda, kda * kda * n_head
    inner, state = r.integer("ssm.inner_size", 0), r.integer("ssm.state_size", 0)
    groups, kernel = r.integer("ssm.group_count", 0), r.integer("ssm.conv_kernel", 0)
    return max(0, kernel - 1) * (inner + 2 * groups * state), state * inner


def recommend(
    source: TensorSource, memory: int, *, n_ctx: int = 8192, kv: str = "f16", types: Iterable[str] = CHOICES
) -> Recommendation:
    """Which of `types` of `source` run in `memory` bytes with a context of `n_ctx` tokens: nothing is quantized."""
    choices = []
    for plan in plan_all(source, [file_type(name) for name in types], QuantizeOptions(allow_requantize=True)):
        need = memory_needed(plan.metadata, {t.info.name: t.info for t in plan}, n_ctx=n_ctx, kv=kv)
        choices.append(Choice(plan.name, plan.file_size, need, need.total <= memory))
    return _ranked(memory, choices)


def recommend_files(
    models: Mapping[str, TensorSource], memory: int, *, n_ctx: int = 8192, kv: str = "f16"
) -> Recommendation:
    """Which of these files run in `memory` bytes; `models` are GGUF files by the name to show."""
    choices = []
    for name, model in models.items():
        need = memory_needed(model.metadata, model.tensors, n_ctx=n_ctx, kv=kv)
        choices.append(Choice(name, need.weights, need, need.total <= memory))
    return _ranked(memory, choices)


def gguf_files(directory: Path) -> dict[str, TensorSource]:
    """The GGUF models in a directory, by name; empty where it holds none, or is a checkpoint."""
    if not directory.is_dir():
        return {}
    later = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
    return {path.name: GGUFSource(path) for path in sorted(directory.rglob("*.gguf")) if not later.search(path.name)}


def _ranked(memory: int, choices: Sequence[Choice]) -> Recommendation:
    if not choices:
        raise QuantkitError("there is nothing to choose from")
    return Recommendation(memory, sorted(choices, key=lambda choice: -choice.need.total))
