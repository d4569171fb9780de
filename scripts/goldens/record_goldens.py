"""Record what llama.cpp's converter makes of checkpoints: whole-file hashes, metadata and tensors.

    python scripts/goldens/record_goldens.py LLAMA_CPP [NAME or CHECKPOINT ...]

LLAMA_CPP is llama.cpp's source directory; needs what its convert_hf_to_gguf.py needs (torch, transformers). Records
the tiny checkpoints of make_checkpoints.py called NAME, and each CHECKPOINT directory, or all the tiny ones, into
tests/goldens/convert/NAME.json. The converter knows pre-tokenizers by a hash of their vocabulary; it is told
llama-bpe, which all of these use, or the name that it knows the real vocabulary of the family by, which means the same.
Its exponentials, sines and cosines are rounded correctly: those of torch depend on the machine in the last bit.
The files are read back with the reader of its own gguf package. Records and tensors are told by the first 64 bits of
their SHA-256, whole files by all.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_checkpoints import FAMILIES, PACKED, PROJECTORS, RECIPES, make_checkpoint

GOLDENS = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "convert"
PRE = {"SMOLLM3": "smaug-bpe", "GLM4": "glm4", "GLM4_MOE": "glm4"}
PUBLISHED_BOS = 127959  # of Hunyuan-A13B
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
REFERENCE_LOAD_HPARAMS: Any = None


def load_hparams(directory: Path, is_mistral_format: bool) -> dict[str, Any]:
    """What the converter's own function gives, with what it reads for GPT-NeoX and transformers 5 takes away.

    And without the experts that transformers 5 gives Nemotron-H, which has none.
    """
    stored: dict[str, Any] = json.loads((directory / "config.json").read_text())
    if stored.get("model_type") == "nemotron_h" and "num_experts_per_tok" not in stored:
        return stored
    if stored["architectures"] == ["NomicBertModel"]:  # transformers 5 has a class of that name with other fields
        return stored
    kept = {key: stored[key] for key in ("rotary_pct",) if key in stored}
    return kept | REFERENCE_LOAD_HPARAMS(directory, is_mistral_format)


def pre_of(model: Any, tokenizer: Any) -> str:
    """The name of the pre-tokenizer: one for WordPiece, that of the family, or Llama 3's."""
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        return "jina-v2-en"
    return PRE.get(model.model_arch.name, "llama-bpe")


class RankTokenizer:
    """What the converter reads of a tokenizer that checkpoints bring as Python around a file of tiktoken's ranks.

    Written by what the published files of Hunyuan and Kimi do: after the ranks come the special tokens.
    """

    def __init__(self, path: Path, n_vocab: int, settings: dict[str, Any]) -> None:
        """Read the ranks at `path`."""
        pairs = (line.split() for line in path.read_bytes().splitlines())
        self.mergeable_ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        self.vocab_size = n_vocab
        self.model = types.SimpleNamespace(_mergeable_ranks=self.mergeable_ranks)
        first = len(self.mergeable_ranks)
        named = [settings.get("added_tokens_decoder", {}).get(str(i), {}).get("content") for i in range(first, n_vocab)]
        if path.name == "hy.tiktoken":
            named = [*("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>")]
            named += [f"<|extra_{i}|>" for i in range(n_vocab - first - len(named))]
        self.special_tokens = {text or f"<|reserved_token_{i}|>": i for i, text in enumerate(named, first)}


def reading_ranks(checkpoint: Path) -> contextlib.ExitStack:
    """While it lasts the converter reads a file of ranks, where there is one, without the checkpoint's own Python."""
    import conversion.base
    import gguf
    import transformers

    stack = contextlib.ExitStack()
    path, pre = checkpoint / "hy.tiktoken", "hunyuan"
    if not path.is_file():
        path, pre = checkpoint / "tiktoken.model", "kimi-k2"
    if path.is_file():
        n_vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        made = RankTokenizer(path, n_vocab, json.loads((checkpoint / "tokenizer_config.json").read_text()))
        add, bos = gguf.GGUFWriter.add_bos_token_id, len(made.mergeable_ranks) + 2
        for where, name, instead in (
            (transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: made),
            (conversion.base.TextModel, "get_vocab_base_pre", lambda *_: pre),
            # The number of <|bos|> in the only published vocabulary is written in the converter.
            (gguf.GGUFWriter, "add_bos_token_id", lambda self, i: add(self, bos if i == PUBLISHED_BOS else i)),
        ):
            stack.enter_context(mock.patch.object(where, name, instead))
    return stack


def convert(checkpoint: Path, outtype: str, directory: Path, *more: str) -> Path:
    """Run the reference converter's own main, with its default file name and options `more`."""
    import conversion.base
    import conversion.rwkv
    import convert_hf_to_gguf

    # Kept by the class, from one conversion to the next.
    conversion.rwkv.Rwkv7Model.lerp_weights.clear()
    conversion.base.TextModel.get_vocab_base_pre = pre_of
    conversion.base.ModelBase.load_hparams = staticmethod(load_hparams)
    output = directory / outtype
    output.mkdir()
    sys.argv = ["convert_hf_to_gguf.py", str(checkpoint), "--outtype", outtype, "--outfile", str(output), *more]
    with reading_ranks(checkpoint):
        convert_hf_to_gguf.main()
    (made,) = output.glob("*.gguf")
    return made


def describe(path: Path) -> dict[str, Any]:
    """What a GGUF file holds, by hash: its metadata records and its tensors, in file order."""
    import gguf

    reader = gguf.GGUFReader(path)
    metadata = []
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF."):
            record = b"".join(part.tobytes() for part in entry.parts)
            value = None if entry.types[0] == gguf.GGUFValueType.ARRAY else entry.contents()
            types = [kind.name for kind in entry.types]
            short = value if not isinstance(value, str) or len(value) < 60 else None
            metadata.append([key, types, hashlib.sha256(record).hexdigest()[:16], short])
    tensors = [
        [t.name, t.tensor_type.name, [int(n) for n in t.shape], hashlib.sha256(t.data.tobytes()).hexdigest()[:16]]
        for t in reader.tensors
    ]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.name, "sha256": digest, "metadata": metadata, "tensors": tensors}


def render(value: Any, depth: int = 0) -> str:
    """JSON with a line for each metadata record and each tensor."""
    if depth == 3 or not isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    items = [
        (f"{json.dumps(key)}: " if isinstance(value, dict) else "")
        + render(value[key] if isinstance(value, dict) else key, depth + 1)
        for key in value
    ]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    space = "\n" + " " * (depth + 1)
    return opening + space + ("," + space).join(items) + "\n" + " " * depth + closing


def main() -> None:
    """Record every checkpoint in every type. Metadata and tensors are listed for `auto`, hashes for all."""
    source = Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import conversion.base
    import torch
    import transformers

    def exact(function: Any) -> Any:
        return lambda x: function(x.to(torch.float64)).to(x.dtype)

    torch.exp, torch.sin, torch.cos = exact(torch.exp), exact(torch.sin), exact(torch.cos)
    torch.nn.functional.softplus = exact(torch.nn.functional.softplus)

    global REFERENCE_LOAD_HPARAMS
    REFERENCE_LOAD_HPARAMS = conversion.base.ModelBase.load_hparams

    GOLDENS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        recipes = RECIPES | FAMILIES | PACKED | PROJECTORS
        for wanted in sys.argv[2:] or recipes:
            checkpoint = make_checkpoint(wanted, scratch) if wanted in recipes else Path(wanted).resolve()
            made = scratch / "made" / checkpoint.name
            made.mkdir(parents=True)
            more = ("--mmproj",) if wanted in PROJECTORS else ()
            files = {outtype: describe(convert(checkpoint, outtype, made, *more)) for outtype in OUTTYPES}
            for outtype in OUTTYPES[1:]:
                files[outtype] = {key: files[outtype][key] for key in ("file", "sha256")}
            text = render({"transformers": transformers.__version__, **files})
            (GOLDENS / f"{checkpoint.name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
