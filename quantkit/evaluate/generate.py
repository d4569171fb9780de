"""Text from a model, one token after another: to read what it says before and after quantization."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluate.layers import Routed
from quantkit.evaluate.transformer import Transformer
from quantkit.machine import available_memory
from quantkit.sources.source import TensorSource
from quantkit.vocabulary import Vocabulary
from quantkit.vocabulary.chat import Message, render

log = logging.getLogger(__name__)

# Tokens of a prompt that go through the layers together, and rows of the output matrix.
_BLOCK = 512
_SLAB = 1 << 15
# Tokens that end an answer under these names, beside the vocabulary's EOS and EOT.
_ENDINGS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|return|>", "<EOT>")


@dataclass(frozen=True)
class Generation:
    """What a model said.

    `text` is the text of `tokens`, which do not hold the one that ended it; `ended` says whether there was one before
    the number of tokens was reached. `n_prompt` counts the prompt's tokens. `seconds` is the time of all passes,
    `tokens_per_second` the speed after the prompt.
    """

    text: str
    ended: bool
    n_prompt: int
    seconds: float
    tokens_per_second: float
    backend: str
    precision: str
    tokens: list[int] = field(repr=False)


class Decoder:
    """A model that reads tokens as they come and remembers the keys and values of those before: numpy, float32.

    `n_ctx` bounds the number of tokens. Raises QuantkitError when the memory for them is not there.
    """

    def __init__(self, source: TensorSource, n_ctx: int, n_threads: int | None = None) -> None:
        self.model = Transformer(source, n_threads)
        self.n_ctx = n_ctx
        self._read: list[int] = []
        shapes = [(layer.attention, layer.attention.n_head_kv) for layer in self.model.spec.layers]
        needed = sum(groups * n_ctx * (a.head_k + a.head_v) * 4 for a, groups in shapes)
        if needed > available_memory():
            raise QuantkitError(
                f"{source.label}: keys and values of {n_ctx} tokens take {needed / 1e9:.1f} GB, more than there is: "
                "use a shorter prompt or fewer tokens"
            )
        self._keys = [np.empty((groups, n_ctx, a.head_k), np.float32) for a, groups in shapes]
        self._values = [np.empty((groups, n_ctx, a.head_v), np.float32) for a, groups in shapes]

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits, float32 [n_vocab], for what follows `tokens`, which follow all that was read before.

        Raises QuantkitError for no tokens, for more than `n_ctx` in all, and for logits that are NaN.
        """
        label = self.model.source.label
        if len(tokens) == 0:
            raise QuantkitError(f"{label}: nothing to continue: the prompt has no tokens")
        if len(self._read) + len(tokens) > self.n_ctx:
            raise QuantkitError(f"{label}: more than {self.n_ctx} tokens")
        for at in range(0, len(tokens), _BLOCK):
            x = self._layers(np.array(tokens[at : at + _BLOCK], np.int32))
        logits = self._logits(x[-1:].copy())
        self.model.refuse_nan(np.array([self._read], np.int32), logits[None])
        return logits

    def _layers(self, tokens: np.ndarray) -> np.ndarray:
        """The last layer's output for `tokens` [n]: [n, n_embd]."""
        model, past, n = self.model, len(self._read), len(tokens)
        x = model.embedded(tokens[None], past)
        # A row times a matrix is over before BLAS's threads have met: one of them does it ten times faster.
        with model._blas(1 if n > 1 else model.n_threads):
            for i, layer in enumerate(model.spec.layers):
                cosines, sines = (
                    np.ascontiguousarray(table[past : past + n]) for table in model._rope(layer.attention, self.n_ctx)
                )
                runner = model.runner(layer, (cosines, sines))
                q, k, v = runner.queries_keys_values(x, past)
                self._keys[i][:, past : past + n] = k[0]
                self._values[i][:, past : past + n] = v[0]
                mixed = np.empty((n, layer.attention.n_head * layer.attention.head_v), np.float32)
                runner.mix(q[0], self._keys[i], self._values[i], 0, past, mixed)
                routed = Routed.of(layer, n, model.spec.n_embd)
                runner.finish(mixed, x[0], routed)
                if routed is not None:
                    for expert in runner.experts():
                        runner.expert(expert, routed)
                    runner.close(x[0], routed)
        self._read += tokens.tolist()
        last: np.ndarray = x[0]
        return last

    def _logits(self, x: np.ndarray) -> np.ndarray:
        model, n_vocab = self.model, self.model.spec.n_vocab
        out = np.empty((1, n_vocab), np.float32)
        with model._blas(model.n_threads):
            model._normalise(model.spec.output_norm, x[None])
            for at in range(0, n_vocab, _SLAB):
                product = model._output(at, min(at + _SLAB, n_vocab))
                out[:, at : at + _SLAB] = model._logits(x, product, np.empty((1, len(product.matrix)), np.float32))
        logits: np.ndarray = out[0]
        return logits


def pick(logits: np.ndarray, temperature: float, top_p: float, generator: np.random.Generator) -> int:
    """A token by its logits [n_vocab]: the likeliest if `temperature` is 0, else drawn at random.

    Drawn from the fewest tokens that hold the share `top_p` of the probability, and then with the logits divided by
    `temperature`, in llama.cpp's order.
    """
    if temperature == 0:
        return int(np.argmax(logits))
    wide = logits.astype(np.float64) - logits.max()
    order = np.argsort(-wide, kind="stable")
    p = np.exp(wide[order])
    kept = order[: 1 + int(np.searchsorted(np.cumsum(p) / p.sum(), top_p))]
    p = np.exp(wide[kept] / temperature)
    return int(generator.choice(kept, p=p / p.sum()))


def generate(
    source: TensorSource,
    prompt: str,
    n_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    n_threads: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Generation:
    """Let the model `source` continue `prompt` by at most `n_tokens` tokens.

    At temperature 0 each token is the likeliest one, else drawn (see `pick`; the same `seed` draws the same numbers).
    With `chat` the prompt is a user's message, after the message `system` if there is one, in the model's own template.
    After each token `progress(tokens, n_tokens, tokens a second)` is called.

    Raises QuantkitError for settings that make no sense, a missing or failing template, and when logits are NaN.
    """
    if n_tokens < 1:
        raise QuantkitError(f"cannot generate {n_tokens} tokens: use 1 or more")
    if not 0 <= temperature < float("inf"):
        raise QuantkitError(f"a temperature of {temperature} makes no sense: use 0 or more")
    if not 0 < top_p <= 1:
        raise QuantkitError(f"a top-p of {top_p} makes no sense: use more than 0, at most 1")
    vocabulary = Vocabulary.from_metadata(source.metadata)
    if chat:
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        try:
            prompt = render(source.metadata, [*messages, {"role": "user", "content": prompt}])
        except QuantkitError as error:
            raise QuantkitError(f"{source.label}: {error}") from None
    elif system is not None:
        raise QuantkitError("a system message needs the chat template")
    ids = vocabulary.encode(prompt, parse_special=chat).tolist()
    if vocabulary.add_eos:
        ids = ids[:-1]
    decoder = Decoder(source, len(ids) + n_tokens, n_threads)
    trained = decoder.model.spec.n_ctx_train
    if decoder.n_ctx > trained:
        log.warning("%s: trained on %d tokens at most, these are %d", source.label, trained, decoder.n_ctx)
    endings = {vocabulary.eos, vocabulary.eot}
    endings |= {i for i, text in enumerate(vocabulary.tokens) if text in _ENDINGS and vocabulary.is_control(i)}
    generator = np.random.default_rng(seed)
    tokens: list[int] = []
    began = time.perf_counter()
    logits, ended = decoder.read(ids), False
    after_prompt = time.perf_counter()
    while True:
        token = pick(logits, temperature, top_p, generator)
        ended = token in endings
        if ended:
            break
        tokens.append(token)
        if progress is not None:
            progress(len(tokens), n_tokens, len(tokens) / max(1e-9, time.perf_counter() - after_prompt))
        if len(tokens) == n_tokens:
            break
        logits = decoder.read([token])
    now = time.perf_counter()
    return Generation(
        text=vocabulary.decode([*ids, *tokens], special=False)[len(vocabulary.decode(ids, special=False)) :],
        ended=ended,
        n_prompt=len(ids),
        seconds=now - began,
        tokens_per_second=max(0, len(tokens) - 1) / max(1e-9, now - after_prompt),
        backend=decoder.model.backend,
        precision=decoder.model.precision,
        tokens=tokens,
    )
