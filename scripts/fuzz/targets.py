"""What is fuzzed: one function a reader, from bytes to whatever the reader makes of them.

A target lets QuantkitError pass, since one line is what a malformed file is to be; anything else is found.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quantkit import blocks
from quantkit.architectures import forward_spec
from quantkit.architectures.config import Config
from quantkit.errors import QuantkitError
from quantkit.evaluate.tasks import read_tasks
from quantkit.formats.gguf import Metadata
from quantkit.formats.imatrix import ImportanceMatrix
from quantkit.formats.logits import LogitsFile
from quantkit.formats.safetensors import SafetensorsCheckpoint
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.pipeline.plan import plan_copy, plan_quantize
from quantkit.report.contents import describe
from quantkit.sources.source import GGUFSource
from quantkit.trust.verify import verify
from quantkit.vocabulary import Vocabulary
from quantkit.vocabulary.special_tokens import SpecialTokens

TINYLM = Path(__file__).resolve().parents[2] / "fixtures" / "tinylm"
# A folder in memory where there is one: a file is written for each input.
HOME = Path(tempfile.mkdtemp(prefix="quantkit-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def _file(data: bytes, name: str) -> Path:
    path = HOME / name
    path.write_bytes(data)
    return path


def _consume(source: GGUFSource) -> None:
    """Everything that reads metadata; each by itself, since most inputs satisfy few."""
    metadata: Metadata = source.metadata
    for task in (
        lambda: describe(source).as_dict(),
        lambda: str(describe(source)),
        lambda: forward_spec(metadata, source.tensors),
        lambda: plan_copy(source).file_size,
        lambda: plan_quantize(source, FILE_TYPES["Q4_K_M"]),
        lambda: Vocabulary.from_metadata(metadata).encode("Hello 123", parse_special=True),
    ):
        try:
            task()
        except QuantkitError:
            continue


def gguf(data: bytes) -> None:
    """A GGUF file: its header, and all that reads its metadata."""
    source = GGUFSource(_file(data, "x.gguf"))
    for name in source.tensors:
        source.read(name, 0, 1)
    _consume(source)


def gguf_verify(data: bytes) -> None:
    """`quantkit verify` of a GGUF file."""
    str(verify(_file(data, "x.gguf"), 1))


def imatrix(data: bytes) -> None:
    """An importance matrix in either format."""
    matrix = ImportanceMatrix.load(_file(data, "x.imatrix"))
    matrix.weights()
    matrix.select(["a"], [])


def safetensors(data: bytes) -> None:
    """A safetensors file."""
    checkpoint = SafetensorsCheckpoint(_file(data, "model.safetensors").parent)
    for name in checkpoint.tensors:
        try:
            checkpoint.data(name)
        except QuantkitError:
            continue


def safetensors_index(data: bytes) -> None:
    """The index of a checkpoint in shards."""
    folder = HOME / "index"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_bytes(data)
    SafetensorsCheckpoint(folder)


def config(data: bytes) -> None:
    """config.json, through every family's reading of it."""
    from quantkit.architectures import load_architecture

    folder = _file(data, "config.json").parent
    Config.load(folder)
    architecture = load_architecture(folder)
    for check in (lambda: architecture.n_layers, lambda: architecture.rope_dimensions, lambda: architecture.rope.type):
        try:
            check()
        except QuantkitError:
            continue


def _folder(name: str, **files: bytes) -> Path:
    folder = HOME / name
    folder.mkdir(exist_ok=True)
    for file, data in files.items():
        (folder / file.replace("__", ".")).write_bytes(data)
    return folder


def projector(data: bytes) -> None:
    """config.json and, after a NUL, preprocessor_config.json of a multimodal checkpoint."""
    import gguf

    from quantkit.architectures.projectors import load_projector

    first, _, second = data.partition(b"\0")
    folder = _folder("projector", config__json=first, preprocessor_config__json=second)
    load_projector(folder).write_parameters(gguf.GGUFWriter(path=None, arch="clip"), gguf.LlamaFileType.MOSTLY_F16)


def packed(data: bytes) -> None:
    """config.json and, after a NUL, model.safetensors of a checkpoint that is packed already: rows of its matrices."""
    from quantkit.sources.packed import quantization_of, unpacked

    first, _, second = data.partition(b"\0")
    folder = _folder("packed", config__json=first, model__safetensors=second)
    raw = SafetensorsCheckpoint(folder)
    if (quantization := quantization_of(folder, Config.load(folder))) is None:
        return
    checkpoint = unpacked(raw, quantization)
    for name in filter(checkpoint.kind_of, checkpoint.tensors):
        try:
            rows = checkpoint.data(name)
            n_rows = int(np.prod(rows.shape[:-1], dtype=object))
            for start in {0, n_rows // 2, n_rows - 1} if n_rows else ():
                assert checkpoint.read(name, rows, start, start + 1).shape == (1, rows.shape[-1])
        except QuantkitError:
            continue


def adapter(data: bytes) -> None:
    """adapter_config.json and, after a NUL, adapter_model.safetensors of an adapter to the fixture."""
    from quantkit.architectures import load_architecture
    from quantkit.sources.adapter import AdapterSource

    first, _, second = data.partition(b"\0")
    folder = _folder("adapter", adapter_config__json=first, adapter_model__safetensors=second)
    source = AdapterSource(folder, load_architecture(TINYLM))
    for task in (
        source.check_for_file,
        lambda: source.invocation,
        lambda: source.metadata,
        lambda: [source.read(name) for name in source.tensors],
    ):
        try:
            task()
        except QuantkitError:
            continue


def tokenizer_json(data: bytes) -> None:
    """tokenizer.json and tokenizer_config.json, but for what the tokenizers library does in its own process."""
    from quantkit.vocabulary import recognition
    from quantkit.vocabulary.checkpoint_files import CheckpointFiles

    folder = HOME / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(data)
    (folder / "tokenizer_config.json").write_bytes(data)
    files = CheckpointFiles(folder, {})
    try:
        SpecialTokens(files, merges=True)
        files.special_tokens()
        files.declared_tokens  # noqa: B018
        recognition.recognise(files.tokenizer_json or {})
    except (AttributeError, TypeError, KeyError, IndexError, ValueError, OverflowError, RecursionError):
        pass  # one line, by `write_vocabulary`


def sentencepiece(data: bytes) -> None:
    """tokenizer.model, as `write_vocabulary` reads it."""
    from quantkit.vocabulary.checkpoint_files import CheckpointFiles
    from quantkit.vocabulary.writing_sentencepiece import read_sentencepiece

    folder = HOME / "sentencepiece"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(data)
    read_sentencepiece(CheckpointFiles(folder, {}))


def logits(data: bytes) -> None:
    """A file of log-probabilities."""
    file = LogitsFile(_file(data, "x.kld"))
    file.chunk(0)


def tasks(data: bytes) -> None:
    """Task files; the first byte says of which kind."""
    if data:
        kind = ("hellaswag", "winogrande", "multiple-choice")[data[0] % 3]
        read_tasks(kind, _file(data[1:], "tasks"), 3 if data[0] & 4 else None)


def decoders(data: bytes) -> None:
    """Blocks of any type; the first byte says of which."""
    kinds = blocks.encodable()
    if data:
        kind = kinds[data[0] % len(kinds)]
        whole = (len(data) - 1) // kind.type_size * kind.type_size
        if whole:
            rows = np.frombuffer(data[1 : 1 + whole], np.uint8).reshape(1, -1)
            out = blocks.decode(rows, kind)
            assert out.shape == (1, whole // kind.type_size * kind.block_size)


def vocabulary(data: bytes) -> None:
    """A vocabulary as JSON: the model, the tokens, merges, scores and types of a GGUF, and a text."""
    from quantkit.formats.gguf import ValueType

    try:
        made = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(made, dict):
        return
    metadata = Metadata()
    try:
        metadata.set("tokenizer.ggml.model", ValueType.STRING, str(made.get("model", "gpt2")))
        metadata.set("tokenizer.ggml.pre", ValueType.STRING, str(made.get("pre", "default")))
        for key in ("tokens", "merges"):
            items = [str(item) for item in made.get(key) or []]
            metadata.set(f"tokenizer.ggml.{key}", ValueType.ARRAY, items, ValueType.STRING)
        types = [int(item) % 8 for item in made.get("types") or []]
        metadata.set("tokenizer.ggml.token_type", ValueType.ARRAY, types, ValueType.INT32)
        if scores := [float(item) for item in made.get("scores") or []]:
            metadata.set("tokenizer.ggml.scores", ValueType.ARRAY, scores, ValueType.FLOAT32)
    except (TypeError, ValueError, UnicodeEncodeError):
        return
    known = Vocabulary.from_metadata(metadata)
    text = str(made.get("text", ""))
    ids = known.encode(text, parse_special=True)
    known.decode(ids)


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (
        gguf,
        gguf_verify,
        imatrix,
        safetensors,
        safetensors_index,
        config,
        tokenizer_json,
        sentencepiece,
        logits,
        tasks,
        decoders,
        vocabulary,
        adapter,
        projector,
        packed,
    )
}
