"""Metadata from strangers: whatever a key holds, whoever reads it, it works or it is one line that says why not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny import FAMILIES, tiny_metadata, tiny_weights, write_gguf

from quantkit.architectures import forward_spec
from quantkit.errors import QuantkitError
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.formats.gguf import Metadata, Value, ValueType
from quantkit.formats.imatrix import ImportanceMatrix
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.pipeline.naming import Destination, output_paths
from quantkit.pipeline.plan import plan_copy, plan_quantize
from quantkit.report.comparison import compare
from quantkit.report.contents import describe
from quantkit.sources.checkpoint import output_name
from quantkit.sources.source import GGUFSource
from quantkit.vocabulary import Vocabulary
from quantkit.vocabulary.chat import Message, render

MESSAGES: list[Message] = [{"role": "user", "content": "hi"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"

INTEGERS = [kind for kind in ValueType if kind.name.startswith(("INT", "UINT"))]
NAN_PAYLOAD = Value(ValueType.FLOAT32, b"\xff\xff\xff\xff")


def _integer(kind: ValueType) -> st.SearchStrategy[Value]:
    bits = int(kind.name.lstrip("UINT"))
    low, high = (0, 2**bits - 1) if kind.name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    chosen = st.one_of(st.sampled_from([low, high, 0, 1]), st.integers(max(low, -3), min(high, 1000)))
    return chosen.map(lambda n: Value.of(kind, n))


def _array(item: ValueType) -> st.SearchStrategy[Value]:
    element = st.text(max_size=5) if item == ValueType.STRING else st.sampled_from([0, 1, 127])
    return st.lists(element, max_size=6).map(lambda items: Value.of(ValueType.ARRAY, items, item))


VALUES = st.one_of(
    *map(_integer, INTEGERS),
    *(st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-45, 1e30]).map(functools.partial(Value.of, kind))
      for kind in (ValueType.FLOAT32, ValueType.FLOAT64)),
    st.booleans().map(functools.partial(Value.of, ValueType.BOOL)),
    st.one_of(st.text(max_size=20), st.sampled_from(["yarn", "longrope", "gpt2", "llama", "a\x1b[2Jb", "x" * 5000]))
    .map(functools.partial(Value.of, ValueType.STRING)),
    *map(_array, [kind for kind in ValueType if kind != ValueType.ARRAY]),
    st.just(NAN_PAYLOAD),
    st.just(Value(ValueType.STRING, b"\x03\0\0\0\0\0\0\0\xff\xfe\xfd")),
    st.just(Value(ValueType.ARRAY, b"\x08\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\xff\xfe")),
)  # fmt: skip


class Recorded(Metadata):
    """Metadata that remembers which keys were asked for."""

    def __init__(self, values: Metadata, asked: set[str]) -> None:
        super().__init__(values)
        self.asked = asked

    def __getitem__(self, key: str) -> Value:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
        self.asked.add(key)
        return super().get(key, default)  # type: ignore[arg-type]

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


@functools.cache
def model(family: str, home: Path) -> GGUFSource:
    """A tiny model of a family, with a chat template and a name."""
    if family == "tiny":
        metadata, weights = tiny_metadata(), tiny_weights()
    else:
        metadata, weights = FAMILIES[family].metadata(), FAMILIES[family].weights(1)
    metadata.set("tokenizer.chat_template", ValueType.STRING, TEMPLATE)
    metadata.set("general.name", ValueType.STRING, "Tiny")
    metadata.set("general.file_type", ValueType.UINT32, 0)
    return GGUFSource(write_gguf(home / f"{family}.gguf", metadata, weights))


def _forward(source: GGUFSource) -> None:
    forward_spec(source.metadata, source.tensors)
    tokens = np.arange(8, dtype=np.int32)[None]
    Transformer(source, Compute(threads=1)).logits(tokens)


def _plans(source: GGUFSource) -> None:
    for kind in ("Q4_K_M", "COPY"):
        plan = plan_quantize(source, FILE_TYPES.get(kind, FILE_TYPES["F32"]))
        assert plan.file_size > 0
    plan = plan_copy(source)
    plan.split_by(max_tensors=3)
    assert plan.file_size > 0


def _vocabulary(source: GGUFSource) -> None:
    vocabulary = Vocabulary.from_metadata(source.metadata)
    vocabulary.decode(vocabulary.encode("Hello, wörld 12345", parse_special=True))


def _names(source: GGUFSource) -> None:
    name = output_name(source.metadata, "F16")
    assert "/" not in name and "\x1b" not in name
    output_paths(Destination(Path("x.gguf"), False), source, ["F16"])


CONSUMERS: dict[str, Callable[[GGUFSource], None]] = {
    "forward pass": _forward,
    "plans": _plans,
    "vocabulary": _vocabulary,
    "names": _names,
    "contents": lambda source: print(describe(source), describe(source).as_dict()),
    "comparison": lambda source: print(compare(source, source)),
}


def with_value(source: GGUFSource, key: str, value: Value | None) -> GGUFSource:
    """The same model with another value of one key, or without the key."""
    changed = object.__new__(GGUFSource)
    changed.__dict__.update(source.__dict__)
    changed.metadata = Metadata(source.metadata)
    changed.metadata.pop(key, None)
    if value is not None:
        changed.metadata[key] = value
    return changed


def asked_for(source: GGUFSource, consumer: Callable[[GGUFSource], None]) -> list[str]:
    """The keys that a consumer reads of a model, and that the property is to change."""
    asked: set[str] = set()
    watched = object.__new__(GGUFSource)
    watched.__dict__.update(source.__dict__)
    watched.metadata = Recorded(source.metadata, asked)
    consumer(watched)
    return sorted(asked | set(source.metadata))


def one_line(consumer: Callable[[GGUFSource], None], source: GGUFSource) -> None:
    try:
        consumer(source)
    except QuantkitError as problem:
        assert "\n" not in str(problem) and "\x1b" not in str(problem) and len(str(problem)) <= 2000


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("consumer", CONSUMERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_key(home: Path, consumer: str, data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["tiny", *FAMILIES])) if consumer == "forward pass" else "tiny"
    source = model(family, home)
    key = data.draw(st.sampled_from(asked_for(source, CONSUMERS[consumer])))
    one_line(CONSUMERS[consumer], with_value(source, key, data.draw(st.none() | VALUES)))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_key_of_a_chat(home: Path, data: st.DataObject) -> None:
    """Few examples: each is a process."""
    source = model("tiny", home)
    keys = ["tokenizer.chat_template", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.tokens"]
    changed = with_value(source, data.draw(st.sampled_from(keys)), data.draw(st.none() | VALUES))
    one_line(lambda each: render(each.metadata, MESSAGES), changed)  # type: ignore[arg-type, return-value]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.none() | VALUES, key=st.sampled_from(["split.count", "split.tensors.count", "split.no"]))
def test_any_value_of_the_keys_of_a_split(home: Path, key: str, value: Value | None) -> None:
    metadata = tiny_metadata()
    metadata.set("split.count", ValueType.UINT16, 1)
    if value is None:
        metadata.pop(key, None)
    else:
        metadata[key] = value
    path = write_gguf(home / "split.gguf", metadata, {})
    one_line(lambda _: GGUFSource(path), None)  # type: ignore[arg-type, return-value]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.none() | VALUES, key=st.sampled_from([f"imatrix.{k}" for k in ("datasets", "chunk_count", "chunk_size")])
)
def test_any_value_of_the_keys_of_an_importance_matrix(home: Path, key: str, value: Value | None) -> None:
    metadata = Metadata()
    metadata.set("imatrix.datasets", ValueType.ARRAY, ["a"], ValueType.STRING)
    metadata.set("imatrix.chunk_count", ValueType.UINT32, 1)
    metadata.set("imatrix.chunk_size", ValueType.UINT32, 1)
    metadata.pop(key)
    if value is not None:
        metadata[key] = value
    sums = {"a.in_sum2": np.ones((1, 4), np.float32), "a.counts": np.ones((1, 1), np.float32)}
    path = write_gguf(home / "imatrix.gguf", metadata, sums)
    (home / "again.gguf").unlink(missing_ok=True)
    one_line(lambda _: ImportanceMatrix.load(path).save(home / "again.gguf"), None)  # type: ignore[arg-type, return-value]
