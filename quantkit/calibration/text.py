"""The text that a model is calibrated on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluate.settings import Chunking
from quantkit.evaluate.texts import text_sha256
from quantkit.formats.gguf import Metadata, ValueType
from quantkit.sources.source import TensorSource
from quantkit.vocabulary import Vocabulary

# Unlike a measurement, a calibration need not see all of a long text: more chunks than this gain little.
CHUNKING = Chunking(chunks=128)


@dataclass(frozen=True)
class CalibrationText:
    """A text cut into chunks: `tokens` is int32 [n_chunks, n_ctx]. `name` and `sha256` say which text it was."""

    name: str
    sha256: str
    tokens: np.ndarray = field(repr=False)

    @classmethod
    def of(
        cls, source: TensorSource, text: str | np.ndarray, chunking: Chunking = CHUNKING, name: str = ""
    ) -> CalibrationText:
        """Cut `text`, a string or token ids, as `chunking` says, for the model `source`; `name` is what it is called.

        As for an importance matrix, the first token of a chunk becomes BOS where the vocabulary adds one, and what does
        not fill a chunk is dropped. Raises QuantkitError for a text without a whole chunk.
        """
        n_ctx, chunks = chunking.n_ctx, chunking.chunks
        vocabulary = Vocabulary.from_metadata(source.metadata)
        ids = np.asarray(vocabulary.encode(text) if isinstance(text, str) else text, np.int32)
        n_chunks = min(len(ids) // n_ctx, len(ids) if chunks is None else chunks)
        if n_chunks == 0:
            raise QuantkitError(
                f"{name or 'the calibration text'}: has {len(ids)} tokens, which do not fill a chunk of {n_ctx}"
            )
        tokens = np.array(ids[: n_chunks * n_ctx], np.int32).reshape(n_chunks, n_ctx)
        if vocabulary.add_bos and vocabulary.bos is not None:
            tokens[:, 0] = vocabulary.bos
        return cls(name, text_sha256(text), tokens)

    @property
    def n_chunks(self) -> int:
        """Chunks of the text."""
        return len(self.tokens)

    @property
    def n_ctx(self) -> int:
        """Tokens of a chunk."""
        return int(self.tokens.shape[1])

    def describe(self, metadata: Metadata, rounding: str) -> None:
        """Say in the `metadata` of a file how it was made."""
        for key, kind, value in (
            ("rounding", ValueType.STRING, rounding),
            ("calibration.text", ValueType.STRING, self.name),
            ("calibration.sha256", ValueType.STRING, self.sha256),
            ("calibration.chunks", ValueType.UINT32, self.n_chunks),
            ("calibration.context_length", ValueType.UINT32, self.n_ctx),
        ):
            metadata.set(f"quantkit.{key}", kind, value)

    def require(self, widest: int) -> None:
        """Raise QuantkitError where the text is too short for second moments of rows of `widest` weights."""
        needed = least_tokens(widest)
        if self.tokens.size < needed:
            raise QuantkitError(
                f"{self.name or 'the calibration text'}: {self.tokens.size} tokens are too few for second moments of "
                f"rows of {widest} weights: {needed} are needed at least, and {widest} or more do well"
            )


def least_tokens(n_in: int) -> int:
    """The fewest tokens at which damped second moments of `n_in` columns still make a better rounding than none."""
    return n_in // 8
