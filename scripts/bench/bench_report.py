"""A whole report against the reference's tools for the same files and chunks, in turn.

    python scripts/bench/bench_report.py --model docs-llama-45m-F16.gguf --text ../shared/data/docs-test.txt \\
        [--ladder full] [--chunks 80] [--threads 2] [--repeat 2] [--directory DIR]

Ours is one command, `quantkit report`: every type of the ladder, the divergence of each from the source, continuations
of prompts, the page and the card. The reference's are a process each: llama-quantize for every type, then
llama-perplexity for the source and, with `--kl-divergence`, for every type. They are called through llama-cpp-python;
of llama-perplexity only loading and decoding are timed, so what it does to the logits, and the file of the source's
logits, count as nothing. Checks that both wrote the same files, and prints a Markdown table of seconds.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from bench_quantize import OURS, THEIRS, run

from quantkit.evaluate.perplexity import chunked, tokenize
from quantkit.evaluate.settings import Chunking
from quantkit.pipeline.mixtures import file_type
from quantkit.report.ladder import ladder_types
from quantkit.report.tables import table
from quantkit.sources.source import GGUFSource
from quantkit.vocabulary import Vocabulary

# What llama-perplexity does, in a process of its own: load a model and decode the chunks of a file.
DECODE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import numpy as np
from bench_perplexity import Reference
chunks = np.load(sys.argv[2])
reference = Reference(Path(sys.argv[1]), chunks.shape[1], int(sys.argv[3]))
reference.run(chunks)
"""


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="an F16 GGUF file of the model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ladder", default="full", help="as `quantkit report --ladder`")
    parser.add_argument("--chunks", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--directory", type=Path)
    args = parser.parse_args()
    types, threads = ladder_types(args.ladder.split(",")), str(args.threads)
    with tempfile.TemporaryDirectory(dir=args.directory) as temporary:
        home = Path(temporary)
        model, ours = home / "model-F16.gguf", home / "ours"
        shutil.copyfile(args.model, model)
        source = GGUFSource(model)
        ids, bos = tokenize(Vocabulary.from_metadata(source.metadata), args.text.read_text(encoding="utf-8"))
        chunks = chunked(ids, Chunking(chunks=args.chunks), bos, str(args.text))
        np.save(home / "chunks.npy", chunks)
        report = [OURS, "report", str(model), "-q", "--ladder", args.ladder, "--text", str(args.text)]
        report += ["--chunks", str(args.chunks), "-t", threads, "-o", f"{ours}/"]
        rounds = []
        for i in range(args.repeat + 1):
            shutil.rmtree(ours, ignore_errors=True)
            whole = run(report)[0]
            if i == 0:
                first = whole  # compiles the kernels, unless an earlier run did
                continue
            quantize = decode = 0.0
            for name in types:
                theirs = home / "theirs.gguf"
                quantize += run([THEIRS, str(model), str(theirs), str(file_type(name).number), threads])[0]
                decode += run([DECODE, str(theirs), str(home / "chunks.npy"), threads])[0]
                if not filecmp.cmp(ours / f"model-{name}.gguf", theirs, shallow=False):
                    sys.exit(f"{name}: the files differ")
            decode += run([DECODE, str(model), str(home / "chunks.npy"), threads])[0]
            rounds.append((whole, quantize, decode))
    whole, quantize, decode = (min(column) for column in zip(*rounds, strict=True))
    headers = "types | chunks | quantkit report s | llama-quantize s | llama-perplexity s | times faster | first run s"
    row = [len(types), len(chunks), f"{whole:.1f}", f"{quantize:.1f}", f"{decode:.1f}"]
    row += [f"{(quantize + decode) / whole:.2f}", f"{first:.1f}"]
    print(table(headers.split(" | "), [[str(cell) for cell in row]]))


if __name__ == "__main__":
    main()
