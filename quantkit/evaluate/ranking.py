"""Scores of texts: what a classifier, or a reranker, makes of the vector of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from quantkit.architectures.products import Linear
from quantkit.errors import QuantkitError
from quantkit.evaluate import activation_kernels, norm_kernels
from quantkit.evaluate.backends import AnyModel, load
from quantkit.evaluate.embeddings import RANK, pooled
from quantkit.evaluate.model import Model
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.weights import Weights
from quantkit.formats.gguf import Metadata
from quantkit.vocabulary import Vocabulary

# A query and a document, or a text by itself.
Ranked = str | tuple[str, str]
_PROMPT = "tokenizer.chat_template.rerank"


def rank(
    model: AnyModel,
    texts: Sequence[Ranked],
    *,
    compute: Compute | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The scores of `texts`, float32 [texts, classes], as llama-embedding computes them with `--pooling rank`.

    `model` is a loaded model, a source, or a path, of a classifier or a reranker. A text is one string, or a query and
    a document, which become one as the model's own prompt or vocabulary says. The texts of special tokens count as
    these. What the classes are called, `labels` says. After each text `progress(done, texts)` is called. Raises
    QuantkitError for a model without a classifier, for pairs that it cannot put together, and as `embed`.
    """
    model = load(model, compute)
    head = Classifier(model)
    vocabulary = Vocabulary.from_metadata(model.source.metadata)
    scores = np.empty((len(texts), head.n_out), np.float32)
    for i, text in enumerate(texts):
        scores[i] = head.scores(tokens(model.source.metadata, vocabulary, text))
        if progress is not None:
            progress(i + 1, len(texts))
    return scores


def ranks(model: Model, pooling: str | None) -> bool:
    """Whether texts get scores: where `pooling` is rank, or without one, where the model's metadata says so.

    A model with a classifier gives scores where its metadata is silent.
    """
    if pooling is not None:
        return pooling == "rank"
    number = model.source.metadata.integer(f"{model.spec.architecture}.pooling_type", default=0)
    return number == RANK or (number == 0 and model.spec.head is not None)


def labels(metadata: Metadata, n_classes: int) -> list[str]:
    """What the classes are called, in their order: by the metadata, else by number where there are several."""
    key = f"{metadata.architecture}.classifier.output_labels"
    found = metadata.strings(key) if key in metadata else []
    if len(found) == n_classes:
        return list(found)
    return [str(i) for i in range(n_classes)] if n_classes > 1 else ["score"]


def pair(line: str) -> Ranked:
    """A query and a document that a tab separates, or a text by itself. Raises QuantkitError for more tabs."""
    parts = line.split("\t")
    if len(parts) > 2:
        raise QuantkitError(f"a query and a document have one tab between them, not {len(parts) - 1}: {line[:80]!r}")
    return (parts[0], parts[1]) if len(parts) == 2 else line


def tokens(metadata: Metadata, vocabulary: Vocabulary, text: Ranked) -> np.ndarray:
    """The ids of what is ranked: of a pair in the model's prompt for it, or with what separates two texts."""
    if isinstance(text, str):
        return vocabulary.encode(text, parse_special=True)
    query, document = text
    if _PROMPT not in metadata:
        return vocabulary.encode_pair(query, document, parse_special=True)
    parts, template = {"{query}": query, "{document}": document}, metadata.string(_PROMPT)
    if any(template.count(place) != 1 for place in parts):
        raise QuantkitError(f"the metadata's {_PROMPT} does not have {' and '.join(parts)} once each")
    prompt = re.sub(r"\{query\}|\{document\}", lambda found: parts[found[0]], template)
    return vocabulary.encode(prompt, parse_special=True)


class Classifier:
    """The classifier behind a model's layers. It sees one vector of a text, so the CPU does it for any backend."""

    def __init__(self, model: Model) -> None:
        head = model.spec.head
        if head is None:
            raise QuantkitError(f"{model.source.label}: it has no classifier, so it gives texts no scores")
        self._model, self._head, self.n_out = model, head, head.n_out
        weights, shapes = Weights(model.source, model.threads.run, keep=True), head.shapes(model.spec.n_embd)

        def product(linear: Linear | None) -> tuple[np.ndarray, np.ndarray | None]:
            if linear is None:
                return np.empty((0, 0), np.float32), None
            n_out, n_in = shapes[linear.weight]
            bias = None if linear.bias is None else weights.vector(linear.bias, n_out)
            return weights.matrix(linear.weight, [(linear.weight, n_out)], n_in), bias

        self._dense, self._out = product(head.dense), product(head.out)
        self._norm = np.empty(0, np.float32)
        if head.norm is not None and head.norm.weight is not None:
            self._norm = weights.vector(head.norm.weight, len(self._dense[0]))

    def scores(self, ids: np.ndarray) -> np.ndarray:
        """The scores of a text of these tokens: float32 [n_out]. Raises QuantkitError where one is NaN."""
        head, label = self._head, self._model.source.label
        x = pooled(self._model, ids, head.pooling.value)[None]
        if head.dense is not None:
            x = _times(x, *self._dense)
            if head.gelu:
                activation_kernels.gelu(x, x)
            else:
                x = np.tanh(x)
        if head.norm is not None:
            norm_kernels.layer_norm(x, self._norm, np.zeros_like(self._norm), head.norm.eps, x)
        if head.out is not None:
            x = _times(x, *self._out)
        if head.softmax:
            x = np.exp(x - x.max())
            x /= x.sum()
        if np.isnan(x).any():
            raise QuantkitError(f"{label}: the scores are NaN: the weights of its classifier are damaged")
        row: np.ndarray = x[0]
        return row


def _times(x: np.ndarray, matrix: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    made: np.ndarray = x @ matrix.T
    return made if bias is None else made + bias
