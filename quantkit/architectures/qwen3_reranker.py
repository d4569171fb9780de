"""Qwen3-Reranker: Qwen3, whose answer "yes" or "no" is the score of a document for a query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Architecture, Assembly, Rearrange, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.qwen3 import Qwen3
from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NAMES = ("qwen3-reranker", "qwen3-vl-reranker")
_ANSWERS = ("yes", "no")
_MOST = 1 << 20  # bytes of a model card that are looked through
_RANK = 4
# The prompt of the model's authors, with places for a query and a document.
_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web '
    "search query, retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: "
    "{document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def is_reranker(config: Config) -> bool:
    """Whether the checkpoint is one by its name or its model card: its class and config are Qwen3's."""
    directory = config.path.parent
    hints = f"{directory.resolve().name} {config.find('_name_or_path') or ''}".lower()
    if any(name in hints for name in _NAMES):
        return True
    card = directory / "README.md"
    if not card.is_file():
        return False
    with open(card, "rb") as file:
        text = file.read(_MOST).decode("utf-8", "replace").lower()
    return any(f"# {name}" in text for name in _NAMES)


def _rank(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """That texts are ranked, the answers in their order, and the prompt."""
    writer.add_uint32(f"{architecture.gguf_name}.pooling_type", _RANK)
    writer.add_array(f"{architecture.gguf_name}.classifier.output_labels", _ANSWERS)
    writer.add_chat_template([{"name": "rerank", "template": _PROMPT}])


class Qwen3Reranker(Qwen3):
    """Qwen3ForCausalLM, of which the rows of the output matrix for the two answers are a classifier."""

    checkpoints = Qwen3.checkpoints
    parameters = (*Qwen3.parameters, _rank)
    notes = "Qwen3 that ranks documents"

    def assemble(self, name: str, stored_name: str) -> Iterator[Assembly]:
        """See Architecture: the classifier is cut from the embedding where that is the output matrix too."""
        tied = bool(self.config.find("tie_word_embeddings"))
        if ("embed_tokens" if tied else "lm_head") in name:
            yield Assembly("cls.output.weight", (stored_name,), Transform(tuple(self._row(text) for text in _ANSWERS)))
            if not tied:
                return
        yield from super().assemble(name, stored_name)

    def _row(self, text: str) -> Rearrange:
        """The row of the token `text`."""
        path = self.config.path.parent / "tokenizer.json"
        told = read_json(path)
        model = told.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
        for token in told.get("added_tokens") or ():
            if isinstance(token, dict) and isinstance(token.get("content"), str):
                ids[token["content"]] = token.get("id")
        row = ids.get(text)
        if not isinstance(row, int) or row < 0:
            raise QuantkitError(f"{path}: it has no token {text!r}, which a reranker answers with")

        def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
            if row >= len(stored):
                raise ValueError
            return stored[row : row + 1]

        return rearrange
