"""A small Llama with random weights as a GGUF file, and its forward pass written down plainly in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from quantkit.blocks import decode, encode
from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType, encode_header, padded
from quantkit.pipeline.source import GGUFSource
from quantkit.vocabulary.encoders import byte_alphabet

N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD, N_LAYER, N_CTX = 96, 160, 6, 2, 16, 2, 256
BOS = 256
N_VOCAB = 258
EPS = 1e-5


def tiny_metadata(**extra: tuple[ValueType, object]) -> Metadata:
    """The metadata of the model, with a vocabulary of bytes; `extra` are `llama.` keys, dots written as underscores."""
    metadata = Metadata()
    metadata.set("general.architecture", ValueType.STRING, "llama")
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
        metadata.set(f"llama.{key}", ValueType.UINT32, value)
    metadata.set("llama.attention.layer_norm_rms_epsilon", ValueType.FLOAT32, EPS)
    metadata.set("llama.rope.freq_base", ValueType.FLOAT32, 10000.0)
    for key, (kind, value) in extra.items():
        metadata.set("llama." + key.replace("__", "."), kind, value)
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


def write_gguf(path: Path, metadata: Metadata, weights: dict[str, np.ndarray], kind: GGMLType = GGMLType.F32) -> Path:
    """Write a GGUF file whose matrices have type `kind`."""
    infos, data = [], []
    for name, array in weights.items():
        own = kind if array.ndim == 2 else GGMLType.F32
        infos.append(TensorInfo(name, tuple(reversed(array.shape)), own))
        encoded = encode(array.reshape(-1, array.shape[-1]), own).tobytes()
        data.append(encoded + bytes(padded(len(encoded), 32) - len(encoded)))
    path.write_bytes(encode_header(metadata, infos, 32) + b"".join(data))
    return path


def plain_logits(path: Path, tokens: np.ndarray, freq_scale: float = 1.0) -> np.ndarray:
    """The logits of tokens [n_ctx] in float64, one line of the paper after another: [n_ctx, n_vocab]."""
    source = GGUFSource(path)
    w = {name: decode(source.read(name), info.type).astype(np.float64) for name, info in source.tensors.items()}
    n = len(tokens)

    def product(x: np.ndarray, name: str) -> np.ndarray:
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
    return norm(x, "output_norm") @ w["output.weight" if "output.weight" in w else "token_embd.weight"].T


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """The norm of the difference over the norm of `b`."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))
