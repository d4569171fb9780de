"""Time the torch backend, and hold it against numpy's float32.

    python scripts/bench/bench_torch.py [MODEL TEXT] --device cuda [--chunks N] [--judge-chunks N] [--synthetic 1b,8b]
        [--layers N] [--what pass,feedback,choose] [--precision f32,bf16] [--directory DIR]

For float32 and bfloat16: perplexity over all chunks, seconds after loading (the first run, which also starts the
device, and the second), and on the first chunks the difference from numpy. With --synthetic, for a Llama of so many
weights made up at random: seconds to load, tokens a second of perplexity, its time over that of the bare matrix
products, tokens a second of an importance matrix and of second moments, the peak memory of the device, and tokens a
second of perplexity, and that memory, where the device keeps one layer's weights at a time. `feedback`
writes a Q4_K_M with error feedback from 128 chunks of 512 random tokens into the directory, `choose` chooses types for
its size by the same tokens: the minutes, and where they went. `--layers` makes the model shallower, for a short trial.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from quantkit.blocks.types import GGMLType
from quantkit.calibration.planning import Target, TypeChooser
from quantkit.calibration.progress import Step
from quantkit.calibration.rounding import execute_with_feedback
from quantkit.calibration.survey import survey
from quantkit.calibration.text import CalibrationText
from quantkit.evaluate.perplexity import chunked, perplexity, tokenize
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.evaluate.torch_backend import TorchTransformer
from quantkit.evaluate.transformer import Transformer
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType
from quantkit.machine import peak_memory
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import plan_quantize
from quantkit.sources.source import open_model
from quantkit.vocabulary import Vocabulary


class SyntheticLlama:
    """A TensorSource of random F16 weights in the shapes of TinyLlama-1.1B or Llama-3-8B, or of their first layers.

    Runs of weights differ in size, as rows of trained models do.
    """

    label = "synthetic Llama"
    files = ()
    sizes: ClassVar = {"1b": (32000, 2048, 5632, 22, 32, 4), "8b": (128256, 4096, 14336, 32, 32, 8)}

    def __init__(self, size: str, layers: int | None = None) -> None:
        self.n_vocab, self.n_embd, self.n_ff, self.n_layer, self.n_head, self.n_head_kv = self.sizes[size]
        self.n_layer = min(self.n_layer, layers or self.n_layer)
        self.metadata = Metadata()
        self.metadata.set("general.architecture", ValueType.STRING, "llama")
        for key, value in {
            "context_length": 2048,
            "embedding_length": self.n_embd,
            "block_count": self.n_layer,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "rope.dimension_count": self.n_embd // self.n_head,
            "vocab_size": self.n_vocab,
        }.items():
            self.metadata.set(f"llama.{key}", ValueType.UINT32, value)
        self.metadata.set("llama.attention.layer_norm_rms_epsilon", ValueType.FLOAT32, 1e-5)
        n_kv = self.n_embd // self.n_head * self.n_head_kv
        shapes = {"token_embd": (self.n_vocab, self.n_embd), "output": (self.n_vocab, self.n_embd)}
        for i in range(self.n_layer):
            for name, shape in {
                "attn_q": (self.n_embd, self.n_embd),
                "attn_k": (n_kv, self.n_embd),
                "attn_v": (n_kv, self.n_embd),
                "attn_output": (self.n_embd, self.n_embd),
                "ffn_gate": (self.n_ff, self.n_embd),
                "ffn_up": (self.n_ff, self.n_embd),
                "ffn_down": (self.n_embd, self.n_ff),
            }.items():
                shapes[f"blk.{i}.{name}"] = shape
        self._tensors = {
            f"{name}.weight": TensorInfo(f"{name}.weight", (n_in, n_out), GGMLType.F16)
            for name, (n_out, n_in) in shapes.items()
        }
        for name in ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(self.n_layer) for n in ("attn", "ffn"))]:
            self._tensors[f"{name}.weight"] = TensorInfo(f"{name}.weight", (self.n_embd,), GGMLType.F32)
        random = np.random.default_rng(1)
        runs = random.standard_normal((self.n_vocab, self.n_embd), np.float32)
        runs *= np.exp(0.3 * random.standard_normal((self.n_vocab, 1), np.float32)) / 45
        self._pool = runs.astype(np.float16).reshape(-1)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """See TensorSource."""
        return self._tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See TensorSource."""
        info = self._tensors[name]
        stop = info.n_rows if stop is None else stop
        if info.type is GGMLType.F32:
            return np.ones((stop - start, info.n_per_row), np.float32).view(np.uint8)
        rows = self._pool[: info.n_rows * info.n_per_row].reshape(info.n_rows, info.n_per_row)
        return rows[start:stop].view(np.uint8)

    def release(self, name: str) -> None:
        """See TensorSource."""


def synchronize(device: str) -> None:
    """Wait for what is under way on `device`."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Seconds that `function` takes, after one call that is not counted."""
    function()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def bare_products(llama: SyntheticLlama, n_tokens: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """The matrix products of `n_tokens` tokens, half of them scored, and nothing else."""
    embd, ff, kv = llama.n_embd, llama.n_ff, llama.n_embd // llama.n_head * llama.n_head_kv
    layer = [(embd, embd), (embd, kv), (embd, kv), (embd, embd), (embd, ff), (embd, ff), (ff, embd)]
    make = partial(torch.randn, dtype=dtype, device=device)
    matrices = [make(n_out, n_in) for n_in, n_out in layer]
    output, x = make(llama.n_vocab, embd), {n: make(n_tokens, n) for n in (embd, ff)}

    def run() -> None:
        for _ in range(llama.n_layer):
            for (n_in, _), matrix in zip(layer, matrices, strict=True):
                torch.mm(x[n_in], matrix.t())
        for start in range(0, n_tokens // 2, 2048):
            torch.mm(x[embd][start : start + 2048], output.t())

    return run


def observed(model: TorchTransformer, tokens: np.ndarray, full: bool) -> None:
    """Run `tokens` and sum what the matrices are multiplied with: squares, or all second moments of the first layer."""
    wanted = {f"blk.0.{name}.weight" for name in ("attn_q", "ffn_gate", "ffn_down")} if full else None
    sums = model.input_sums(full, wanted=wanted)
    model.pass_through(tokens)
    sums.take()
    model.observer = None


class Where:
    """The seconds that went to each kind of tensor, from the steps of a run.

    Those of error feedback come when a tensor is done, those of a choice when one is `begun`.
    """

    def __init__(self, begun: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._since, self._begun, self._part = time.perf_counter(), begun, "through the layer"

    def __call__(self, step: Step) -> None:
        """Count what has passed since the last step."""
        now, part = time.perf_counter(), step.tensor.removeprefix(f"blk.{step.layer}.") or "through the layer"
        self._part, of = part, self._part if self._begun else part
        self.seconds[of] = self.seconds.get(of, 0.0) + now - self._since
        self._since = now


def calibrated(llama: SyntheticLlama, device: str, precision: str, what: str, directory: str | None) -> None:
    """Print the minutes that error feedback or the choice of types takes."""
    tokens = np.random.default_rng(3).integers(0, llama.n_vocab, (128, 512)).astype(np.int32)
    text, options, where = (
        CalibrationText("random", "", tokens),
        QuantizeOptions(calibrated=True),
        Where(what == "choose"),
    )
    model = TorchTransformer(llama, Compute(backend="torch", device=device, precision=precision), keep=False)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=directory) as home:
        if what == "feedback":
            path = Path(home) / "rounded.gguf"
            ((*tensors,),) = execute_with_feedback(
                model, [(plan_quantize(llama, "Q4_K_M", options), path)], text, progress=where
            )
            losses = [(t.loss, t.plain_loss) for t in tensors if t.loss is not None and t.plain_loss is not None]
            gain = {"loss": round(float(np.mean([loss / plain for loss, plain in losses])), 4)}
            gain["bytes"] = path.stat().st_size
        else:
            chooser = TypeChooser(llama, [Target.parse("Q4_K_M")], options, text)
            gain = {"tensors": len(survey(model, text, chooser.candidates, progress=where))}
    print(
        json.dumps(
            {
                "what": what,
                "layers": llama.n_layer,
                "precision": precision,
                "minutes": round((time.perf_counter() - began) / 60, 2),
                "seconds_of": {part: round(seconds, 1) for part, seconds in sorted(where.seconds.items())},
                **gain,
                "peak_memory": model.peak_memory(),
                "peak_memory_of_process": peak_memory(),
                "processors": len(os.sched_getaffinity(0)),
            }
        ),
        flush=True,
    )


def streamed(llama: SyntheticLlama, device: str, precision: str, tokens: np.ndarray) -> float:
    """Seconds of perplexity of `tokens` where the device keeps one layer's weights at a time."""
    model = TorchTransformer(llama, Compute(backend="torch", device=device, precision=precision), keep=False)
    return seconds_of(partial(model.log_likelihoods, tokens, 256), device, 1)


def synthetic(llama: SyntheticLlama, device: str, precisions: list[str]) -> None:
    """Print what a synthetic Llama takes; several devices share the bare products without loss."""
    n_weights = sum(info.n_elements for info in llama.tensors.values())
    for precision in precisions:
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
        began = time.perf_counter()
        model = TorchTransformer(llama, Compute(backend="torch", device=device, precision=precision))
        synchronize(device)
        loading, n_seq = time.perf_counter() - began, model.batch(512)
        tokens = np.random.default_rng(2).integers(0, llama.n_vocab, (n_seq, 512)).astype(np.int32)

        measured = seconds_of(partial(model.log_likelihoods, tokens, 256), device)
        first, *others = device.split(",")
        floor = seconds_of(bare_products(llama, tokens.size, dtype, first), first) / (1 + len(others))
        print(
            json.dumps(
                {
                    "weights": n_weights,
                    "precision": precision,
                    "loading": round(loading, 1),
                    "batch": n_seq,
                    "tokens_per_second": round(tokens.size / measured),
                    "share_of_bare_products": round(floor / measured, 3),
                    "imatrix_tokens_per_second": round(
                        tokens.size / seconds_of(partial(observed, model, tokens, False), device)
                    ),
                    "with_moments_of_a_layer_tokens_per_second": round(
                        tokens.size / seconds_of(partial(observed, model, tokens, True), device, 1)
                    ),
                    "peak_memory": model.peak_memory(),
                }
            ),
            flush=True,
        )
        del model
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print(
            json.dumps(
                {
                    "precision": precision,
                    "streamed_tokens_per_second": round(tokens.size / streamed(llama, device, precision, tokens)),
                    "peak_memory": torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak_memory(),
                }
            ),
            flush=True,
        )
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def trained(args: argparse.Namespace) -> None:
    """Print what a trained model takes, and how it differs from numpy's float32."""
    source = open_model(args.model)
    ids, bos = tokenize(Vocabulary.from_metadata(source.metadata), args.text.read_text(encoding="utf-8"))
    judged = chunked(ids, Chunking(chunks=args.judge_chunks), bos, source.label)
    judge = Transformer(source).log_likelihoods(judged, 256)
    for precision in ("f32", "bf16"):
        compute = Compute(backend="torch", device=args.device, precision=precision)
        own = TorchTransformer(source, compute).log_likelihoods(judged, 256)
        runs = [perplexity(source, ids, chunking=Chunking(chunks=args.chunks), compute=compute) for _ in range(2)]
        print(
            json.dumps(
                {
                    "precision": precision,
                    "ppl": runs[1].ppl.value,
                    "chunks": runs[1].n_chunks,
                    "seconds": [round(run.seconds, 3) for run in runs],
                    "tokens_per_second": round(runs[1].tokens_per_second),
                    "largest_difference": float(np.abs(own - judge).max()),
                    "relative_difference": float(np.linalg.norm(own - judge) / np.linalg.norm(judge)),
                    "relative_difference_of_ppl": float(np.exp(judge.mean() - own.mean()) - 1),
                }
            ),
            flush=True,
        )


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--judge-chunks", type=int, default=16, help="chunks that numpy computes too")
    parser.add_argument("--synthetic", default="", help="sizes, with commas: 1b, 8b")
    parser.add_argument("--layers", type=int, help="of the synthetic model, at most")
    parser.add_argument("--what", default="pass", help="of the synthetic model, with commas: pass, feedback, choose")
    parser.add_argument("--precision", default="f32,bf16")
    parser.add_argument("--directory", help="for the files that are written: 10 GB for 8b")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(json.dumps({"device": name, "torch": torch.__version__}), flush=True)
    if args.model is not None:
        trained(args)
    for size in filter(None, args.synthetic.split(",")):
        llama, precisions = SyntheticLlama(size, args.layers), args.precision.split(",")
        if "pass" in args.what.split(","):
            synthetic(llama, args.device, precisions)
        for what in ("feedback", "choose"):
            for precision in precisions if what in args.what.split(",") else ():
                calibrated(llama, args.device, precision, what, args.directory)


if __name__ == "__main__":
    main()
