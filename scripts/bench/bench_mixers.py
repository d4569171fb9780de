"""Time each kind of mixer, and experts, through torch, at the sizes of models that have them, with random weights.

    python scripts/bench/bench_mixers.py --device cuda [--sequences N] [--n-ctx N] [--precision f32,bf16] [--only NAMES]

For each: tokens a second through one layer of nothing else, its time over that of its bare matrix products, the most
memory of the device, and how far the results are from those of torch on the CPU in float32, for two sequences.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from quantkit.architectures.feed_forward import Experts, FeedForward
from quantkit.architectures.forward import ForwardSpec, Layer
from quantkit.architectures.mixers import Attention, LatentAttention, Rope, RopeStyle
from quantkit.architectures.products import Linear, Norm, NormKind
from quantkit.architectures.recurrent_mixers import (
    ChannelMix,
    Convolution,
    DeltaNet,
    LowRank,
    Mamba,
    Mamba2,
    ShortConvolution,
    TimeMix,
)
from quantkit.evaluate.threads import Threads
from quantkit.evaluate.torch_layers import TorchLayer
from quantkit.evaluate.torch_parts import TorchParts, exact_products
from quantkit.evaluate.torch_weights import Loading

OUT, NORM = Linear("out"), Norm("layer_norm", 1e-6)
ROPE = Rope(64, 1e6, RopeStyle.NEOX)


def _low(name: str, rank: int) -> LowRank:
    return LowRank(rank, Linear(f"{name}_down"), Linear(f"{name}_up"), f"{name}_bias")


# By model: n_embd and the layer's only part, as in their config.json.
PARTS: dict[str, tuple[int, Any]] = {
    "Qwen3-Next-80B-A3B, gated delta net": (
        2048,
        DeltaNet(
            16, 32, 128, 128, 1e-6, Linear("qkv"), Linear("gate"), Convolution("taps", 4, 8192, silu=True), "dt_bias",
            "decay", Norm("head_norm", 1e-6), OUT, beta_alpha=Linear("beta_alpha"),
        ),
    ),
    "Qwen3-Next-80B-A3B, gated attention": (
        2048,
        Attention(
            16, 2, 256, 256, 1 / 16, OUT, Linear("q"), Linear("k"), Linear("v"), rope=ROPE, q_norm=Norm("q_norm", 1e-6),
            k_norm=Norm("k_norm", 1e-6), gated=True,
        ),
    ),
    "Qwen3-Next-80B-A3B, experts": (
        2048,
        Experts(
            512, 512, 10, Linear("router"), "gate", "up", "down",
            shared=FeedForward(512, Linear("shared_down"), up=Linear("shared_up"), gate=Linear("shared_gate")),
            shared_gate=Linear("share"),
        ),
    ),
    "DeepSeek-V2-Lite, latent attention": (
        2048,
        LatentAttention(
            16, 128, 128, 512, 192**-0.5, ROPE, Linear("kv_down"), Norm("kv_norm", 1e-6), "k_up", "v_up", OUT,
            Linear("q"),
        ),
    ),
    "LFM2-1.2B, short convolution": (2048, ShortConvolution(Linear("project"), Convolution("taps", 3, 2048), OUT)),
    "Granite-4.0-H-Tiny, Mamba 2": (
        1536,
        Mamba2(
            48, 1, 64, 128, Linear("project"), Convolution("taps", 4, 3328, "taps_bias", True), "dt_bias", "decay",
            "skip", OUT, Norm("group_norm", 1e-5),
        ),
    ),
    "mamba-2.8b, Mamba": (
        2560,
        Mamba(
            5120, 16, 160, Linear("project"), Convolution("taps", 4, 5120, "taps_bias", True), Linear("select"),
            Linear("step", "step_bias"), "decay", "skip", OUT,
        ),
    ),
    "rwkv7-2.9B, time mix": (
        2560,
        TimeMix(
            40, 64, "lerp", Linear("r"), Linear("k"), Linear("v"), OUT, _low("w", 96), _low("a", 96),
            LowRank(320, Linear("g_down"), Linear("g_up"), None), None, "key_scale", "key_rate", "bonus",
            Norm("heads", 64e-5, NormKind.LAYER, "heads_bias"), 2560,
        ),
    ),
    "rwkv7-2.9B, channel mix": (2560, ChannelMix(2560, 10240, "lerp", Linear("key"), OUT)),
}  # fmt: skip


class RandomWeights:
    """Stands where the weights of a model do: all that a layer asks for, made up."""

    def __init__(self, n_embd: int, device: str, dtype: torch.dtype) -> None:
        self.n_embd, self.device, self.dtype = n_embd, torch.device(device), dtype
        self.tensors: dict[str, Any] = {}
        self.products: list[tuple[int, int]] = []

    def matrix(self, name: str) -> Any:
        """See `TorchWeights`."""
        return self.tensors[name]


class RandomLoading(Loading):
    """Makes up what is asked for, the same for every device."""

    def __init__(self, weights: RandomWeights) -> None:
        super().__init__(weights, weights.device, weights.tensors)  # type: ignore[arg-type]
        self._made = weights

    def _put(self, name: str, values: Any, dtype: torch.dtype) -> None:
        self.tensors[name] = values.to(self.device, dtype)

    def _random(self, name: str, *shape: int) -> Any:
        """Random numbers, the first 2^24 of which come again in larger tensors."""
        generator, n = torch.Generator().manual_seed(sum(map(ord, name))), math.prod(shape)
        made = torch.randn(min(n, 1 << 24), generator=generator)
        return made.repeat(-(-n // len(made)))[:n].view(shape)

    def matrix(self, name: str, n_rows: int, n_in: int) -> None:
        """See `Loading`."""
        self._put(name, self._random(name, n_rows, n_in) / math.sqrt(n_in), self._made.dtype)
        self._made.products.append((n_rows, n_in))

    def constant(self, name: str, shape: tuple[int, ...]) -> None:
        """See `Loading`."""
        values, is_vector = self._random(name, *shape), len(shape) == 1
        values = -values.abs() if name == "decay" else 1 + 0.1 * values if is_vector else values / math.sqrt(shape[1])
        self._put(name, values, torch.float32)


def built(part: Any, n_embd: int, device: str, dtype: torch.dtype) -> tuple[TorchLayer, RandomWeights]:
    """A layer of `part` and nothing else, with its weights."""
    weights = RandomWeights(n_embd, device, dtype)
    layer = Layer((), part, None, NORM) if isinstance(part, Experts) else Layer((part,), None, NORM, None)
    # What RWKV's first layer keeps for the others stands behind the stream.
    n_kept = part.width if isinstance(part, TimeMix) else 0
    spec = ForwardSpec("bench", 1, n_embd, 1 << 20, "embedding", (layer,), NORM, OUT, n_kept=n_kept)
    parts = TorchParts(weights, Threads(1), False, lambda: None)  # type: ignore[arg-type]
    runner = TorchLayer(layer, spec, parts)
    runner.load(RandomLoading(weights))
    return runner, weights


def seconds_of(function: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Seconds that `function` takes, after one call that is not counted."""
    began = 0.0
    for i in range(repeats + 1):
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if i == 0:
            began = time.perf_counter()
    return (time.perf_counter() - began) / repeats


def bare(part: Any, weights: RandomWeights, n_tokens: int) -> Callable[[], None]:
    """The matrix products that `n_tokens` tokens need, and nothing else; of experts those that tokens choose."""
    share = part.n_used / part.n_expert if isinstance(part, Experts) else 1.0
    pairs = []
    for n_rows, n_in in weights.products:
        stacked = isinstance(part, Experts) and n_rows in (part.n_expert * part.n_ff, part.n_expert * weights.n_embd)
        rows = max(1, int(n_rows * share)) if stacked else n_rows
        made = torch.zeros(rows, n_in, device=weights.device, dtype=weights.dtype)
        pairs.append((torch.zeros(n_tokens, n_in, device=weights.device, dtype=weights.dtype), made))

    def multiply() -> None:
        for x, matrix in pairs:
            torch.nn.functional.linear(x, matrix)

    return multiply


def measured(name: str, device: str, precision: str, n_seq: int, n_ctx: int) -> dict[str, Any]:
    """What the part called `name` takes."""
    n_embd, part = PARTS[name]
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    layer, weights = built(part, n_embd, device, dtype)
    width = n_embd + (part.width if isinstance(part, TimeMix) else 0)
    few = torch.randn(2, n_ctx, width, generator=torch.Generator().manual_seed(1))
    span = slice(0, n_ctx)
    judge = built(part, n_embd, "cpu", torch.float32)[0].run(few, span) - few
    found = layer.run(few.to(device), span).cpu() - few
    x = few.to(device).repeat(-(-n_seq // 2), 1, 1)[:n_seq]
    seconds = seconds_of(lambda: layer.run(x, span), device)
    floor = seconds_of(bare(part, weights, n_seq * n_ctx), device)
    return {
        "part": name,
        "precision": precision,
        "tokens": n_seq * n_ctx,
        "tokens_per_second": round(n_seq * n_ctx / seconds),
        "share_of_bare_products": round(floor / seconds, 3),
        "relative_difference_from_cpu_f32": float((found - judge).norm() / judge.norm()),
        "peak_memory": torch.cuda.max_memory_allocated() if device.startswith("cuda") else None,
    }


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--precision", default="f32,bf16")
    parser.add_argument("--only", default="", help="part of the names to run")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(json.dumps({"device": name, "torch": torch.__version__}), flush=True)
    with torch.no_grad(), exact_products():
        for part in PARTS:
            if args.only in part:
                for precision in args.precision.split(","):
                    print(json.dumps(measured(part, args.device, precision, args.sequences, args.n_ctx)), flush=True)


if __name__ == "__main__":
    main()
