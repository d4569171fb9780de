"""Small models with random weights as GGUF files, and a Llama's forward pass written down plainly in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quantkit.blocks import decode, encode
from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType, encode_header, padded
from quantkit.sources.source import GGUFSource
from quantkit.vocabulary.encoders import byte_alphabet

N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD, N_LAYER, N_CTX = 96, 160, 6, 2, 16, 2, 256
BOS = 256
N_VOCAB = 258
EPS = 1e-5


def tiny_metadata(arch: str = "llama", **extra: tuple[ValueType, object]) -> Metadata:
    """The metadata of a model, with a vocabulary of bytes; `extra` are its own keys, dots written as underscores."""
    metadata = Metadata()
    metadata.set("general.architecture", ValueType.STRING, arch)
    for key, value in {
        "context_length": N_CTX,
        "embedding_length": N_EMBD,
        "block_count": N_LAYER,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "rope.dimension_count": HEAD,
        "vocab_size": N_VOCAB,
    }.items():
        metadata.set(f"{arch}.{key}", ValueType.UINT32, value)
    metadata.set(f"{arch}.attention.layer_norm_rms_epsilon", ValueType.FLOAT32, EPS)
    metadata.set(f"{arch}.rope.freq_base", ValueType.FLOAT32, 10000.0)
    for key, (kind, value) in extra.items():
        item = ValueType.BOOL if kind is ValueType.ARRAY else None
        metadata.set(f"{arch}." + key.replace("__", "."), kind, value, item)
    alphabet = byte_alphabet()
    tokens = [alphabet[byte] for byte in range(256)] + ["<s>", "</s>"]
    metadata.set("tokenizer.ggml.model", ValueType.STRING, "gpt2")
    metadata.set("tokenizer.ggml.pre", ValueType.STRING, "llama-bpe")
    metadata.set("tokenizer.ggml.tokens", ValueType.ARRAY, tokens, ValueType.STRING)
    metadata.set("tokenizer.ggml.token_type", ValueType.ARRAY, [1] * 256 + [3, 3], ValueType.INT32)
    metadata.set("tokenizer.ggml.merges", ValueType.ARRAY, [], ValueType.STRING)
    metadata.set("tokenizer.ggml.bos_token_id", ValueType.UINT32, BOS)
    metadata.set("tokenizer.ggml.eos_token_id", ValueType.UINT32, BOS + 1)
    return metadata


def tiny_weights(
    seed: int = 0, tied: bool = False, biases: bool = False, factors: bool = False
) -> dict[str, np.ndarray]:
    """Random tensors, float32 in numpy's order of axes."""
    rng = np.random.default_rng(seed)
    n_q, n_kv = N_HEAD * HEAD, N_HEAD_KV * HEAD
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        weights[f"{name}.weight"] = (rng.standard_normal((n_out, n_in)) * gain / math.sqrt(n_in)).astype(np.float32)
        if biases and name.startswith("blk"):
            weights[f"{name}.bias"] = (rng.standard_normal(n_out) * 0.2).astype(np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = (1 + 0.2 * rng.standard_normal(N_EMBD)).astype(np.float32)

    if factors:
        weights["rope_freqs.weight"] = rng.uniform(1, 8, HEAD // 2).astype(np.float32)
    matrix("token_embd", N_VOCAB, N_EMBD, 4.0)
    for i in range(N_LAYER):
        at = f"blk.{i}."
        norm(at + "attn_norm")
        matrix(at + "attn_q", n_q, N_EMBD, 2.0)
        matrix(at + "attn_k", n_kv, N_EMBD, 2.0)
        matrix(at + "attn_v", n_kv, N_EMBD)
        matrix(at + "attn_output", N_EMBD, n_q)
        norm(at + "ffn_norm")
        matrix(at + "ffn_gate", N_FF, N_EMBD)
        matrix(at + "ffn_up", N_FF, N_EMBD)
        matrix(at + "ffn_down", N_EMBD, N_FF)
    norm("output_norm")
    if not tied:
        matrix("output", N_VOCAB, N_EMBD, 2.0)
    return weights


_ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
_GATED = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_EXPERTS = ("ffn_norm", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_QK_NORMS = ("attn_q_norm", "attn_k_norm")
_POST_NORMS = ("post_attention_norm", "post_ffw_norm")
_BIASED = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Family:
    """What a family's GGUF files hold beside what all hold: keys (dots written as two underscores) and tensors.

    `tensors` are those of a layer, `biased` those that have a bias too, `whole` says that QK norms are as long as all
    heads together, and `fused` that ffn_up is a gate and more in one.
    """

    arch: str
    tensors: tuple[str, ...]
    keys: dict[str, tuple[ValueType, object]] = field(default_factory=dict)
    biased: tuple[str, ...] = ()
    n_layer: int = 4
    head: int = HEAD
    tied: bool = False
    positions: int = 0
    n_expert: int = 0
    n_ff_expert: int = N_FF
    whole: bool = False
    fused: bool = False
    factors: tuple[str, ...] = ()

    def metadata(self) -> Metadata:
        """The metadata of the tiny model of this family."""
        own = {"block_count": (ValueType.UINT32, self.n_layer), **self.keys}
        return tiny_metadata(self.arch, **own)

    def weights(self, seed: int) -> dict[str, np.ndarray]:
        """Random tensors, float32 in numpy's order of axes."""
        rng = np.random.default_rng(seed)
        n_q, n_kv = N_HEAD * self.head, N_HEAD_KV * self.head
        n_kv = n_kv if self.arch not in ("gpt2", "gptneox") else n_q
        shapes = {
            "attn_q": (n_q, N_EMBD), "attn_k": (n_kv, N_EMBD), "attn_v": (n_kv, N_EMBD), "attn_output": (N_EMBD, n_q),
            "attn_qkv": (n_q + 2 * n_kv, N_EMBD), "ffn_gate": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF),
            "ffn_up": (N_FF * (2 if self.fused else 1), N_EMBD), "ffn_gate_inp": (self.n_expert, N_EMBD),
            "ffn_gate_exps": (self.n_expert, self.n_ff_expert, N_EMBD),
            "ffn_up_exps": (self.n_expert, self.n_ff_expert, N_EMBD),
            "ffn_down_exps": (self.n_expert, N_EMBD, self.n_ff_expert),
            "attn_q_norm": (n_q if self.whole else self.head,), "attn_k_norm": (n_kv if self.whole else self.head,),
        }  # fmt: skip
        # Experts weigh little: where a row is as near to one as to another, a rounding chooses, and all changes.
        gains = {
            "attn_q": 1.2,
            "attn_k": 1.2,
            "attn_qkv": 1.2,
            "output": 2.0,
            "ffn_gate_inp": 6.0,
            "ffn_down_exps": 0.25,
        }
        weights: dict[str, np.ndarray] = {}

        def tensor(name: str, shape: tuple[int, ...]) -> None:
            stem = name.rsplit(".", 1)[-1]
            random = rng.standard_normal(shape)
            scaled = 1 + 0.2 * random if len(shape) == 1 else random * gains.get(stem, 1.0) / math.sqrt(shape[-1])
            weights[f"{name}.weight"] = scaled.astype(np.float32)
            if stem in self.biased:
                weights[f"{name}.bias"] = (rng.standard_normal(shape[0]) * 0.2).astype(np.float32)

        for name in self.factors:
            weights[f"{name}.weight"] = rng.uniform(1, 8, HEAD // 2).astype(np.float32)
        tensor("token_embd", (N_VOCAB, N_EMBD))
        if self.positions:
            tensor("position_embd", (self.positions, N_EMBD))
        for i in range(self.n_layer):
            for name in self.tensors:
                tensor(f"blk.{i}.{name}", shapes.get(name, (N_EMBD,)))
        tensor("output_norm", (N_EMBD,))
        if "attn_norm" in self.biased:
            weights["output_norm.bias"] = (rng.standard_normal(N_EMBD) * 0.2).astype(np.float32)
        if not self.tied:
            tensor("output", (N_VOCAB, N_EMBD))
        return weights


def _u32(value: int) -> tuple[ValueType, object]:
    return ValueType.UINT32, value


def _f32(value: float) -> tuple[ValueType, object]:
    return ValueType.FLOAT32, value


_YARN = {
    "rope__scaling__type": (ValueType.STRING, "yarn"),
    "rope__scaling__factor": _f32(4.0),
    "rope__scaling__original_context_length": _u32(64),
}
_LAYER_NORM = {"attention__layer_norm_epsilon": _f32(EPS), "attention__head_count_kv": _u32(N_HEAD)}
_HEAD_24 = {"attention__key_length": _u32(24), "attention__value_length": _u32(24), "rope__dimension_count": _u32(24)}
_WINDOW = {"attention__sliding_window": _u32(32)}
_GEMMA = {**_WINDOW, **_HEAD_24}
_LONGROPE = {"rope__scaling__original_context_length": _u32(256), "rope__scaling__attn_factor": _f32(1.19)}
_MIXTURE = {"expert_count": _u32(8), "expert_used_count": _u32(2)}
FAMILIES = {
    "qwen2": Family("qwen2", _ATTENTION + _GATED, _YARN, biased=("attn_q", "attn_k", "attn_v")),
    "qwen3": Family("qwen3", _ATTENTION + _QK_NORMS + _GATED, _HEAD_24, head=24, tied=True),
    "mixtral": Family("llama", _ATTENTION + _EXPERTS, _MIXTURE, n_expert=8),
    "llama-fused": Family("llama", ("attn_norm", "attn_qkv", "attn_output", *_GATED)),
    "llama-long": Family(
        "llama", _ATTENTION + _GATED,
        {**_LONGROPE, "rope__scaling__type": (ValueType.STRING, "longrope")},
        factors=("rope_factors_long", "rope_factors_short"),
    ),
    "qwen3moe": Family(
        "qwen3moe", _ATTENTION + _QK_NORMS + _EXPERTS,
        {**_HEAD_24, "expert_count": _u32(16), "expert_used_count": _u32(4), "expert_feed_forward_length": _u32(64)},
        head=24, n_expert=16, n_ff_expert=64,
    ),
    "gemma2": Family(
        "gemma2", _ATTENTION + _GATED + _POST_NORMS,
        {**_GEMMA, "attn_logit_softcapping": _f32(5.0), "final_logit_softcapping": _f32(3.0)}, head=24, tied=True,
    ),
    "gemma3": Family(
        "gemma3", _ATTENTION + _QK_NORMS + _GATED + _POST_NORMS,
        {
            **_GEMMA, "rope__freq_base": _f32(1e6), "rope__freq_base_swa": _f32(1000.0),
            "rope__scaling__type": (ValueType.STRING, "linear"), "rope__scaling__factor": _f32(8.0),
        },
        n_layer=7, head=24, tied=True,
    ),
    "gemma3-listed": Family(
        "gemma3", _ATTENTION + _QK_NORMS + _GATED + _POST_NORMS,
        {
            **_GEMMA, "final_logit_softcapping": _f32(3.0),
            "attention__sliding_window_pattern": (ValueType.ARRAY, [True, False, False, True]),
        },
        head=24, tied=True,
    ),
    "phi3": Family("phi3", ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"), _WINDOW,
                   fused=True),
    "phi3-long": Family(
        "phi3", ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"), _LONGROPE, fused=True,
        factors=("rope_factors_long", "rope_factors_short"),
    ),
    "phi4": Family(
        "phi3", ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
        {"rope__dimension_count": _u32(12)}, fused=True, tied=True,
    ),
    "gpt2": Family("gpt2", _BIASED, {**_LAYER_NORM, "context_length": _u32(320)}, biased=_BIASED, positions=320,
                   tied=True),
    "gptneox": Family(
        "gptneox", _BIASED,
        {**_LAYER_NORM, "rope__dimension_count": _u32(8), "use_parallel_residual": (ValueType.BOOL, True)},
        biased=_BIASED,
    ),
    "gptneox-sequential": Family(
        "gptneox", _BIASED,
        {**_LAYER_NORM, "rope__dimension_count": _u32(4), "use_parallel_residual": (ValueType.BOOL, False)},
        biased=_BIASED,
    ),
    "olmo2": Family("olmo2", _ATTENTION[1:] + _QK_NORMS + _GATED[1:] + _POST_NORMS, whole=True),
    "olmo3": Family("olmo2", _ATTENTION[1:] + _QK_NORMS + _GATED[1:] + _POST_NORMS, {**_YARN, **_WINDOW}, whole=True),
    "granite": Family(
        "granite", _ATTENTION + _GATED,
        {
            "attention__scale": _f32(0.1), "embedding_scale": _f32(6.0), "residual_scale": _f32(0.3),
            "logit_scale": _f32(4.0),
        },
        biased=("attn_q", "attn_k", "attn_v", "attn_output"), tied=True,
    ),
    "granite-still": Family(
        "granite", _ATTENTION + _GATED,
        {"logit_scale": _f32(4.0), "rope__scaling__finetuned": (ValueType.BOOL, False)},
    ),
    "mistral3": Family(
        "mistral3", _ATTENTION + _GATED,
        {
            **_YARN, "rope__scaling__yarn_beta_fast": _f32(16.0), "rope__scaling__yarn_beta_slow": _f32(2.0),
            "rope__scaling__yarn_log_multiplier": _f32(0.5), "attention__temperature_scale": _f32(0.4),
        },
    ),
    "smollm3": Family("smollm3", _ATTENTION + _GATED, n_layer=5, tied=True),
}  # fmt: skip


def write_gguf(path: Path, metadata: Metadata, weights: dict[str, np.ndarray], kind: GGMLType = GGMLType.F32) -> Path:
    """Write a GGUF file whose matrices have type `kind`."""
    infos, data = [], []
    for name, array in weights.items():
        own = kind if array.ndim > 1 and "ffn_gate_inp" not in name else GGMLType.F32
        infos.append(TensorInfo(name, tuple(reversed(array.shape)), own))
        encoded = encode(array.reshape(-1, array.shape[-1]), own).tobytes()
        data.append(encoded + bytes(padded(len(encoded), 32) - len(encoded)))
    path.write_bytes(encode_header(metadata, infos, 32) + b"".join(data))
    return path


def plain_logits(
    path: Path, tokens: np.ndarray, freq_scale: float = 1.0, seen: dict[str, np.ndarray] | None = None
) -> np.ndarray:
    """The logits of tokens [n_ctx] in float64, one line of the paper after another: [n_ctx, n_vocab].

    `seen` gets what each matrix is multiplied with, by tensor name.
    """
    source = GGUFSource(path)
    w = {name: decode(source.read(name), info.type).astype(np.float64) for name, info in source.tensors.items()}
    n = len(tokens)

    def product(x: np.ndarray, name: str) -> np.ndarray:
        if seen is not None:
            seen[f"{name}.weight"] = x
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"][0] if f"{name}.bias" in w else y

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w[f"{name}.weight"][0]

    frequency = 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD) * freq_scale
    if "rope_freqs.weight" in w:
        frequency = frequency / w["rope_freqs.weight"][0]
    turn = np.exp(1j * np.arange(n)[:, None] * frequency)

    def rotated(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn[:, None]
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)

    x = w["token_embd.weight"][tokens]
    for i in range(N_LAYER):
        at = f"blk.{i}."
        h = norm(x, at + "attn_norm")
        q = rotated(product(h, at + "attn_q").reshape(n, N_HEAD, HEAD))
        k = rotated(product(h, at + "attn_k").reshape(n, N_HEAD_KV, HEAD)).repeat(N_HEAD // N_HEAD_KV, axis=1)
        v = product(h, at + "attn_v").reshape(n, N_HEAD_KV, HEAD).repeat(N_HEAD // N_HEAD_KV, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(HEAD)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + product(np.einsum("hqk,khd->qhd", p, v).reshape(n, -1), at + "attn_output")
        h = norm(x, at + "ffn_norm")
        gate = product(h, at + "ffn_gate")
        x = x + product(gate / (1 + np.exp(-gate)) * product(h, at + "ffn_up"), at + "ffn_down")
    return product(norm(x, "output_norm"), "output" if "output.weight" in w else "token_embd")


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """The norm of the difference over the norm of `b`."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))
