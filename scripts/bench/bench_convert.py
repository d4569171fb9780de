"""Whole conversions against copying the same bytes, and against the reference converter's whole command.

    python scripts/bench/bench_convert.py [--gigabytes 4] [--outtypes auto,f16] [--repeat 3] [--threads 2]
    python scripts/bench/bench_convert.py --checkpoint DIR --reference-python PYTHON_WITH_TORCH

The first makes a synthetic BF16 Llama of that size in shards, then in turn copies its shards and runs `quantkit
convert` on it; every run is a process of its own, start-up included, and what it writes is deleted again. The second
times `quantkit convert` on a checkpoint against `convert_hf_to_gguf.py` of the llama.cpp whose source
QUANTKIT_REFERENCE_SOURCE names. Both print a Markdown table: the fastest run of each, and the peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_checkpoints import ADDED, tokenizer

from quantkit.report.tables import table

HIDDEN, FEED, HEADS, KEY_VALUE, VOCABULARY = 4096, 11008, 32, 8, 32000
COPY = "import shutil, sys\nfor i in range(1, len(sys.argv), 2): shutil.copyfile(sys.argv[i], sys.argv[i + 1])"
# The converter knows few pre-tokenizers; it is told one, so that it goes on.
REFERENCE = (
    "import sys\nsys.path[:0] = [sys.argv[1], sys.argv[1] + '/gguf-py']\ndel sys.argv[1]\n"
    "import conversion.base\nconversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'llama-bpe'\n"
    "import convert_hf_to_gguf\nimport logging\nlogging.disable(logging.INFO)\nconvert_hf_to_gguf.main()"
)
CONVERT = "from quantkit.cli.main import main; main()"


def make_model(directory: Path, nbytes: float) -> None:
    """A Llama in BF16 of about `nbytes`, a shard for each layer."""
    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // HEADS * KEY_VALUE, HIDDEN),
        "self_attn.v_proj": (HIDDEN // HEADS * KEY_VALUE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FEED, HIDDEN),
        "mlp.up_proj": (FEED, HIDDEN),
        "mlp.down_proj": (HIDDEN, FEED),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    ends["lm_head.weight"] = (VOCABULARY, HIDDEN)
    size = 2 * sum(int(np.prod(shape)) for shape in block.values())
    n_layers = max(1, round((nbytes - 4 * VOCABULARY * HIDDEN) / size))
    layers = [{f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()} for i in range(n_layers)]
    draw = np.random.default_rng(0)
    noise = (draw.standard_normal(1 << 24, np.float32) * np.float32(0.02)).view(np.uint32)
    words = (noise >> 16).astype(np.uint16)
    weight_map = {}
    for index, shapes in enumerate([*layers, ends]):
        file = f"model-{index + 1:05d}-of-{n_layers + 1:05d}.safetensors"
        header: dict[str, object] = {}
        at = 0
        for name, shape in shapes.items():
            end = at + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            weight_map[name], at = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for shape in shapes.values():
                left = int(np.prod(shape))
                while left:
                    out.write(words[: min(left, words.size)].tobytes())
                    left -= min(left, words.size)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FEED,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE,
        "num_hidden_layers": n_layers,
        "vocab_size": VOCABULARY,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer()))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": ADDED[0][0], "eos_token": ADDED[1][0]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a command, which must succeed."""
    start = time.perf_counter()
    process = os.posix_spawn(command[0], command, dict(os.environ))
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(command[:4])}")
    return seconds, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measure(commands: dict[str, list[str]], outputs: list[Path], repeat: int) -> dict[str, tuple[float, float]]:
    """The fastest seconds and the largest memory of each command, taken in turn."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(repeat):
        for name, command in commands.items():
            seconds, memory = run(command)
            old = best.get(name, (seconds, memory))
            best[name] = min(seconds, old[0]), max(memory, old[1])
            for output in outputs:
                output.unlink(missing_ok=True)
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--outtypes", default="auto,f16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--reference-python")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        scratch = Path(name)
        output = scratch / "out.gguf"

        def convert(checkpoint: Path, outtype: str) -> list[str]:
            command = [sys.executable, "-c", CONVERT, "convert", str(checkpoint), "--outtype", outtype]
            return [*command, "-o", str(output), "--threads", str(options.threads), "-q"]

        if options.checkpoint is not None:
            theirs = [options.reference_python, "-c", REFERENCE, os.environ["QUANTKIT_REFERENCE_SOURCE"]]
            theirs += [str(options.checkpoint), "--outfile", str(output), "--outtype", "f16"]
            best = measure({"convert_hf_to_gguf.py": theirs, "ours": convert(options.checkpoint, "f16")}, [output],
                           options.repeat)  # fmt: skip
            base = "convert_hf_to_gguf.py"
        else:
            model = scratch / "model"
            model.mkdir()
            make_model(model, options.gigabytes * 1e9)
            shards = sorted(model.glob("*.safetensors"))
            copies = [scratch / shard.name for shard in shards]
            pairs = [str(path) for pair in zip(shards, copies, strict=True) for path in pair]
            commands = {"copy": [sys.executable, "-c", COPY, *pairs]}
            commands |= {outtype: convert(model, outtype) for outtype in options.outtypes.split(",")}
            best = measure(commands, [output, *copies], options.repeat)
            base = "copy"
    rows = [
        [label, f"{seconds:.2f}", f"{best[base][0] / seconds:.2f}", f"{memory:.0f}"]
        for label, (seconds, memory) in best.items()
    ]
    print(table(["run", "seconds", f"speed against {base}", "peak memory, MB"], rows))


if __name__ == "__main__":
    main()
