"""Time our forward pass against llama.cpp's on the same chunks of text, alternating, and against its bare products.

For each type: tokens a second of ours and of the reference, their ratio, and our time over that of the floor: the same
matrix products of the same weights in numpy with as many BLAS threads, and nothing else. Attention's own products
are not in the floor. The reference decodes in llama-perplexity's way: 2,048 tokens a batch as sequences of n_ctx, each
in its own stream, logits for the second half of each; what llama-perplexity does to logits afterwards is not counted
against it.

With F16 come two more lines, the KL divergence from stored logits and the importance matrix (KLD, imatrix): ours
whole, loading of the model included, against the reference's decoding alone, which its own tools add to. `--torch` adds
the torch backend on the CPU, in float32 and bfloat16.

Each round times ours, the reference and the floor once. The table shows medians of each round's ratio, which other work
on the machine disturbs least, and the speeds of the fastest round. `--cpu` compares processor time, not wall time.

    python scripts/bench/bench_perplexity.py --model docs-llama-45m-F16.gguf --text ../shared/data/docs-test.txt
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from quantkit.architectures.forward import FeedForward
from quantkit.evaluate.backends import load
from quantkit.evaluate.divergence import divergence
from quantkit.evaluate.importance import importance_matrix
from quantkit.evaluate.model import Model
from quantkit.evaluate.perplexity import chunked, perplexity, tokenize
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.sources.source import GGUFSource
from quantkit.vocabulary import Vocabulary

SCORED = 2  # the second half of each chunk


class Reference:
    """llama.cpp with a model loaded, decoding chunks as llama-perplexity does."""

    def __init__(self, path: Path, n_ctx: int, n_threads: int) -> None:
        """Load the GGUF file `path`."""
        import llama_cpp

        self.lib, self.n_ctx, self.n_seq = llama_cpp, n_ctx, max(1, 2048 // n_ctx)
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # llama.cpp keeps only a pointer
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.n_seq * n_ctx
        params.n_seq_max = self.n_seq
        params.n_batch = min(2048, self.n_seq * n_ctx)
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = False
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def run(self, chunks: np.ndarray) -> None:
        """Decode all chunks, int32 [n, n_ctx]."""
        first = self.n_ctx // SCORED
        for at in range(0, len(chunks), self.n_seq):
            part = chunks[at : at + self.n_seq]
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
            batch = self.batch
            batch.n_tokens = part.size
            i = 0
            for seq, row in enumerate(part):
                for position, token in enumerate(row.tolist()):
                    batch.token[i], batch.pos[i] = token, position
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
                    batch.logits[i] = position >= first
                    i += 1
            if self.lib.llama_decode(self.context, batch):
                raise SystemExit("llama_decode failed")
            self.lib.llama_get_logits(self.context)

    def close(self) -> None:
        """Free the model."""
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


class Floor:
    """The products that `model`'s weights need for `n_tokens` tokens, half of them scored, and nothing else."""

    def __init__(self, model: Transformer, n_tokens: int) -> None:
        """Make operands of the right shapes, 2,048 tokens at a time."""
        spec, rng = model.spec, np.random.default_rng(0)
        self.n_threads = model.threads.count
        rows = min(2048, n_tokens)
        self.repeats = n_tokens // rows
        scored = rows // SCORED
        shapes = []
        for i, layer in enumerate(spec.layers):
            attention, ff = layer.attention, layer.feed_forward
            assert isinstance(ff, FeedForward)
            n_qkv = (attention.n_head + attention.n_head_kv) * attention.head_k + attention.n_head_kv * attention.head_v
            n = rows if i + 1 < len(spec.layers) else scored  # the last layer goes on with scored positions alone
            shapes += [
                (rows, spec.n_embd, n_qkv),
                (n, attention.n_head * attention.head_v, spec.n_embd),
                (n, spec.n_embd, 2 * ff.n_ff),
                (n, ff.n_ff, spec.n_embd),
            ]
        shapes.append((scored, spec.n_embd, spec.n_vocab))
        self.flops = 2 * self.repeats * sum(n * n_in * n_out for n, n_in, n_out in shapes)
        inputs = {shape[:2]: rng.standard_normal(shape[:2], dtype=np.float32) for shape in shapes}
        outputs = {(n, n_out): np.empty((n, n_out), np.float32) for n, _, n_out in shapes}
        self.products = [
            (inputs[n, n_in], rng.standard_normal((n_out, n_in), dtype=np.float32), outputs[n, n_out])
            for n, n_in, n_out in shapes
        ]

    def run(self) -> None:
        """Make the products."""
        with threadpool_limits(self.n_threads, user_api="blas"):
            for _ in range(self.repeats):
                for x, w, out in self.products:
                    np.matmul(x, w.T, out=out)


def quantized(f16: Path, name: str, n_threads: int, folder: Path) -> Path:
    """The F16 file quantized by the reference to llama-quantize type `name`, in `folder`."""
    import llama_cpp

    if name == "F16":
        return f16
    path = folder / f"{name}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread = n_threads
    if llama_cpp.llama_model_quantize(str(f16).encode(), str(path).encode(), ctypes.byref(params)):
        raise SystemExit(f"the reference could not quantize to {name}")
    return path


def derived(
    source: GGUFSource, chunks: np.ndarray, args: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], object]]:
    """What else is measured over a text: divergence from stored logits, and the importance matrix. Loading included.

    With --torch also log-likelihoods by the torch backend, loading not included.
    """
    logits = folder / "base.logits"
    tokens = chunks.reshape(-1)
    cut, compute = Chunking(n_ctx=args.n_ctx), Compute(threads=args.threads)
    logits.unlink(missing_ok=True)
    perplexity(source, tokens, chunking=cut, compute=compute, save_logits=logits)
    jobs: dict[str, Callable[[], object]] = {
        "KLD": lambda: divergence(source, logits, compute=compute),
        "imatrix": lambda: importance_matrix(source, tokens, chunking=cut, compute=compute),
    }
    for precision in ("f32", "bf16") if args.torch else ():
        model = load(source, Compute(backend="torch", threads=args.threads, precision=precision))
        jobs[f"torch {precision}"] = partial(scored, model, chunks)
    return jobs


def scored(model: Model, chunks: np.ndarray) -> None:
    """The log-likelihoods of the second half of each of `chunks`."""
    step = model.batch(chunks.shape[1])
    for at in range(0, len(chunks), step):
        model.log_likelihoods(chunks[at : at + step], chunks.shape[1] // SCORED)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="an F16 GGUF file of the model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", default="F16,Q8_0,Q4_K_M,IQ4_XS")
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=8, help="chunks in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch", action="store_true", help="measure the torch backend too")
    parser.add_argument("--cpu", action="store_true", help="compare processor time")
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter

    def timed(function: Callable[[], object]) -> float:
        began = clock()
        function()
        return clock() - began

    print(f"{'type':10} {'ours tok/s':>11} {'reference':>11} {'ratio':>7} {'over floor':>11} {'floor GFLOP/s':>14}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.types.split(","):
            path = quantized(args.model, name, args.threads, Path(folder))
            source = GGUFSource(path)
            model = Transformer(source, Compute(threads=args.threads))
            ids, bos = tokenize(Vocabulary.from_metadata(source.metadata), args.text.read_text(encoding="utf-8"))
            chunks = chunked(ids, Chunking(n_ctx=args.n_ctx, chunks=args.chunks), bos, str(args.text))
            reference = Reference(path, args.n_ctx, args.threads)
            bare = Floor(model, chunks.size)
            decode = partial(reference.run, chunks)
            jobs: list[Callable[[], object]] = [partial(scored, model, chunks), decode, bare.run]
            for job in jobs:
                job()
            rounds = [[timed(job) for job in jobs] for _ in range(args.rounds)]
            mine, theirs, least = (min(column) for column in zip(*rounds, strict=True))
            ratio = statistics.median(b / a for a, b, _ in rounds)
            over = statistics.median(a / c for a, _, c in rounds)
            print(
                f"{name:10} {chunks.size / mine:11.0f} {chunks.size / theirs:11.0f} {ratio:7.2f} {over:11.2f} "
                f"{bare.flops / least / 1e9:14.0f}"
            )
            sys.stdout.flush()
            if name == "F16":
                jobs = derived(source, chunks, args, Path(folder))
                for label, job in jobs.items():
                    job()
                    pairs = [(timed(job), timed(decode)) for _ in range(args.rounds)]
                    mine, theirs = (min(column) for column in zip(*pairs, strict=True))
                    ratio = statistics.median(b / a for a, b in pairs)
                    print(f"{label:10} {chunks.size / mine:11.0f} {chunks.size / theirs:11.0f} {ratio:7.2f}")
                    sys.stdout.flush()
            reference.close()


if __name__ == "__main__":
    main()
