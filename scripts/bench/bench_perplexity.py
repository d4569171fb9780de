"""Time our forward pass against llama.cpp's on the same chunks of text, alternating, and against its bare products.

For each type: tokens a second of ours and of the reference, their ratio, and our time over that of the floor: the same
matrix products of the same weights in numpy with as many BLAS threads, and nothing else. Attention's own products
are not in the floor. The reference decodes in llama-perplexity's way: 2,048 tokens a batch, as sequences of n_ctx
or parts of one, each sequence in its own stream, logits for the second half of each; what llama-perplexity does to
logits afterwards is not counted against it.

With F16 come two more lines, the KL divergence from stored logits and the importance matrix (KLD, imatrix): ours
whole, loading of the model included, against the reference's decoding alone, which its own tools add to. `--torch` adds
the torch backend on the CPU, in float32 and bfloat16.

Each round times ours, the reference and the floor once. The table shows medians of each round's ratio, which other work
on the machine disturbs least, and the speeds of the fastest round. `--cpu` compares processor time, not wall time.

    python scripts/bench/bench_perplexity.py --model docs-llama-45m-F16.gguf --text ../shared/data/docs-test.txt \\
        --n-ctx 512,4096
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from quantkit.architectures.feed_forward import FeedForward
from quantkit.architectures.mixers import Attention
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
BATCH = 2048  # tokens that the reference decodes together


class Reference:
    """llama.cpp with a model loaded, decoding chunks as llama-perplexity does."""

    def __init__(self, path: Path, n_ctx: int, n_threads: int) -> None:
        """Load the GGUF file `path`."""
        import llama_cpp

        self.lib, self.n_ctx, self.n_seq = llama_cpp, n_ctx, max(1, BATCH // n_ctx)
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # llama.cpp keeps only a pointer
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.n_seq * n_ctx
        params.n_seq_max = self.n_seq
        params.n_batch = min(BATCH, self.n_seq * n_ctx)
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
            step = BATCH // len(part)
            for start in range(0, self.n_ctx, step):
                self.decode(part[:, start : start + step], start, first)

    def decode(self, part: np.ndarray, start: int, first: int) -> None:
        """Decode tokens [n_seq, n] that stand at the positions from `start` on, with logits from `first` on."""
        batch = self.batch
        batch.n_tokens = part.size
        i = 0
        for seq, row in enumerate(part):
            for position, token in enumerate(row.tolist(), start):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
                batch.logits[i] = position >= first
                i += 1
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        if start + part.shape[1] > first:
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
            (attention,), ff = layer.mixers, layer.feed_forward
            assert isinstance(attention, Attention) and isinstance(ff, FeedForward)
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
    if path.exists():
        return path
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread = n_threads
    if llama_cpp.llama_model_quantize(str(f16).encode(), str(path).encode(), ctypes.byref(params)):
        raise SystemExit(f"the reference could not quantize to {name}")
    return path


def derived(
    source: GGUFSource, chunks: np.ndarray, n_threads: int, with_torch: bool, folder: Path
) -> dict[str, Callable[[], object]]:
    """What else is measured over a text: divergence from stored logits, and the importance matrix. Loading included.

    With `with_torch` also log-likelihoods by the torch backend, loading not included.
    """
    logits = folder / "base.logits"
    tokens = chunks.reshape(-1)
    cut, compute = Chunking(n_ctx=chunks.shape[1]), Compute(threads=n_threads)
    logits.unlink(missing_ok=True)
    perplexity(source, tokens, chunking=cut, compute=compute, save_logits=logits)
    jobs: dict[str, Callable[[], object]] = {
        "KLD": lambda: divergence(source, logits, compute=compute),
        "imatrix": lambda: importance_matrix(source, tokens, chunking=cut, compute=compute),
    }
    for precision in ("f32", "bf16") if with_torch else ():
        model = load(source, Compute(backend="torch", threads=n_threads, precision=precision))
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
    parser.add_argument("--n-ctx", default="512", help="tokens in a chunk; several with commas")
    parser.add_argument("--tokens", type=int, default=8192, help="about how many tokens a round takes")
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

    print(f"{'':10} {'n_ctx':>6} {'ours':>8} {'reference':>10} {'ratio':>6} {'over floor':>11} {'floor GFLOP/s':>14}")

    def show(label: str, n_ctx: int, n_tokens: int, rounds: list[list[float]]) -> None:
        """A line for times of ours and the reference."""
        mine, theirs, *_ = (min(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(one[1] / one[0] for one in rounds)
        line = f"{label:10} {n_ctx:6} {n_tokens / mine:8.0f} {n_tokens / theirs:10.0f} {ratio:6.2f}"
        print(line, end="" if len(rounds[0]) > 2 else "\n", flush=True)

    text = args.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        for name, n_ctx in itertools.product(args.types.split(","), map(int, args.n_ctx.split(","))):
            path = quantized(args.model, name, args.threads, folder)
            source = GGUFSource(path)
            model = load(source, Compute(threads=args.threads))
            assert isinstance(model, Transformer)
            ids, bos = tokenize(Vocabulary.from_metadata(source.metadata), text)
            chunks = chunked(ids, Chunking(n_ctx=n_ctx, chunks=max(1, args.tokens // n_ctx)), bos, str(args.text))
            reference = Reference(path, n_ctx, args.threads)
            bare = Floor(model, chunks.size)
            decode = partial(reference.run, chunks)
            jobs: list[Callable[[], object]] = [partial(scored, model, chunks), decode, bare.run]
            for job in jobs:
                job()
            rounds = [[timed(job) for job in jobs] for _ in range(args.rounds)]
            show(name, n_ctx, chunks.size, rounds)
            over = statistics.median(own / least for own, _, least in rounds)
            print(f" {over:11.2f} {bare.flops / min(one[2] for one in rounds) / 1e9:14.0f}", flush=True)
            if name == "F16":
                for label, job in derived(source, chunks, args.threads, args.torch, folder).items():
                    job()
                    show(label, n_ctx, chunks.size, [[timed(job), timed(decode)] for _ in range(args.rounds)])
            reference.close()


if __name__ == "__main__":
    main()
