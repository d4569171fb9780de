"""The forward pass through torch: on a CPU with bfloat16 units, or on a GPU.

The same description is carried out as in `transformer`. Products run in the precision that is asked for; norms, rotary
embeddings, the residual stream and the log-softmax are float32 in either. float32 products never use TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from quantkit.architectures.forward import SideEmbedding
from quantkit.architectures.products import Products
from quantkit.errors import QuantkitError
from quantkit.evaluate.inputs import Balance, Sums
from quantkit.evaluate.model import Model
from quantkit.evaluate.refusals import refuse_encoder, refuse_unsupported
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.threads import blas_name
from quantkit.machine import peak_memory
from quantkit.sources.source import TensorSource

try:
    import torch
    from torch.nn import functional

    from quantkit.evaluate.torch_layers import TorchLayer, unknown_parts
    from quantkit.evaluate.torch_parts import TorchParts, exact_products, widest_float
    from quantkit.evaluate.torch_streams import load_streams, merged, widened
    from quantkit.evaluate.torch_sums import TorchInputSums
    from quantkit.evaluate.torch_weights import Loading, TorchWeights
except ImportError as error:
    raise QuantkitError(
        f"the torch backend needs the package torch ({error}): install it with pip install 'quantkit[torch]'"
    ) from None

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# Logits that stand in memory together.
_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28, "mps": 1 << 26}
# Tokens that go through the layers together.
_TOKENS = {"cpu": 1024, "cuda": 32768, "mps": 8192}
# Parts of a batch for each of several devices.
_PARTS = 4
# Tokens for each thread of a CPU: their activations stay near its processor.
_TOKENS_OF_A_THREAD = 512


class TorchTransformer(Model):
    """A model that runs through torch.

    `compute` says the device, and the precision of the weights and of the products. All weights are decoded once and
    stay on the device; without `keep`, or where a GPU has no room for them, those of one layer at a time, beside the
    embedding and the output matrix: each layer's are fetched while the one before it computes. A GPU gets packed
    weights and decodes them itself. Several GPUs (cuda:0,cuda:1) share kept layers, and work on parts of a batch one
    after the other; layers that are not kept are the first's. The number of threads holds for decoding and for torch's
    work on the CPU, and for the whole process.

    Raises QuantkitError when the device is not there or its memory too small, and for models that the backend does
    not know.
    """

    def __init__(self, source: TensorSource, compute: Compute, keep: bool = True) -> None:
        super().__init__(source, compute)
        device, precision = compute.device, compute.precision
        self._kind = device.partition(":")[0]
        devices = [_open_device(each, self._kind) for each in device.split(",")]
        # It has the embedding and the output matrix, and what is asked for.
        self._device = devices[0]
        self.gpu = self._device if self._kind == "cuda" else None
        self.backend, self.precision = f"torch {device}", precision
        self._dtype = _DTYPES[precision]
        # torch brings MKL, which leaves AVX-512 unused on other processors than Intel's; numpy's BLAS does not.
        through_numpy = self._kind == "cpu" and self._dtype == torch.float32
        self.blas = blas_name() if through_numpy else _library(self._kind)
        refuse_unsupported(self.spec, source.label)
        for part in unknown_parts(self.spec):
            raise QuantkitError(f"{source.label}: the torch backend does not know {part}: use the default backend")
        if self._kind == "cpu":
            torch.set_num_threads(self.threads.count)
        self._weights = TorchWeights(source, self.spec, self.threads, devices, self._dtype, keep)
        self._parts = TorchParts(self._weights, self.threads, through_numpy, lambda: self.observer)
        self._layers = [TorchLayer(layer, self.spec, self._parts) for layer in self.spec.layers]
        with self._running():
            self._weights.load(self._load, self._layers)

    def _load(self, to: Loading) -> None:
        """Ask for what is no layer's."""
        spec = self.spec
        for table in (spec.embedding, spec.position_embedding, spec.segment_embedding):
            if table is not None:
                to.table(table, spec.n_embd)
        to.norm(spec.embedding_norm, spec.n_embd)
        to.norm(spec.output_norm, spec.n_embd)
        to.products(Products.of(spec.n_embd, (spec.output, spec.n_vocab)))
        load_streams(spec, to)

    # -- what callers ask for

    def log_likelihoods(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        """The natural log of the probability of each token from position `first` + 1 on, given those before it.

        `tokens` is int32 [n_seq, n_ctx]; the result float64 [n_seq, n_ctx - 1 - first].
        """
        refuse_encoder(self.spec, self.source.label)
        stop = tokens.shape[1] - 1
        targets = torch.from_numpy(tokens[:, first + 1 :].astype(np.int64).reshape(-1, 1)).to(self._device)
        with self._running():
            parts = [
                block.gather(1, targets[at : at + len(block)])[:, 0] - block.logsumexp(1)
                for at, block in self._logit_blocks(tokens, first, stop)
            ]
            result: np.ndarray = torch.cat(parts).cpu().numpy().astype(np.float64).reshape(len(tokens), stop - first)
        self.refuse_nan(tokens, result)
        return result

    def hidden(self, tokens: np.ndarray, first: int, stop: int) -> np.ndarray:
        """The last layer's output, normalised, at positions `first` to `stop`: float32 [n_seq, positions, n_embd]."""
        with self._running():
            result: np.ndarray = self._hidden(tokens, first, stop).cpu().numpy()
        return result

    def pass_through(self, tokens: np.ndarray, sums: Sums | None = None) -> None:
        """See `Model`: what comes out stays on the device."""
        with self._running():
            x = self._hidden(tokens, 0, tokens.shape[1])
            bad = x.isnan().flatten(1).any(1, keepdim=True).cpu().numpy()
            self.refuse_nan(tokens, np.where(bad, np.nan, 0.0))
            if sums is not None:
                assert isinstance(sums, TorchInputSums)
                sums.observe((self.spec.output.weight,), x.reshape(-1, self.spec.n_embd), 0, None)

    def embedded(self, tokens: np.ndarray) -> np.ndarray:
        """What the first layer reads for `tokens` [n_seq, n_ctx]: float32 [n_seq, n_ctx, width]."""
        with self._running():
            result: np.ndarray = self._embedded(tokens).cpu().numpy()
        return result

    def layer_pass(self, index: int, n_ctx: int) -> Callable[[np.ndarray], None]:
        """Layer `index` as a function that carries activations [n_seq, n_ctx, width] through it in place.

        Valid until the next call.
        """
        layer = self._layers[index]

        def advance(x: np.ndarray) -> None:
            with self._running():
                self._weights.hold(index)
                there = torch.from_numpy(x)
                there.copy_(layer.run(there.to(self._weights.place(index), non_blocking=True), slice(0, n_ctx)))

        return advance

    def last_gradients(self, x: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Model`."""
        spec, result = self.spec, np.empty(x.shape, np.float32)
        rows, to, places = x.reshape(-1, spec.width), result.reshape(-1, spec.width), draws.reshape(-1, 1)
        step = max(1, _LOGITS[self._kind] // spec.n_vocab)
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            with self._running(), torch.enable_grad():
                read = torch.from_numpy(np.ascontiguousarray(rows[part])).to(self._device).requires_grad_(True)
                scores = self._scores(self._finished(read).to(self._dtype), 0, spec.n_vocab)
                wide = widest_float(self._device)
                reached = scores.detach().softmax(1).to(wide).cumsum(1)
                drawn = torch.searchsorted(
                    reached, torch.from_numpy(places[part]).to(self._device, wide), right=True
                ).clamp(max=spec.n_vocab - 1)
                functional.log_softmax(scores, 1).gather(1, drawn).sum().backward()
                to[part] = read.grad.cpu().numpy()
        return result

    def gradient_pass(self, index: int, n_ctx: int) -> Callable[[np.ndarray, np.ndarray], None]:
        """See `Model`."""
        layer, per_call = self._layers[index], self.batch(n_ctx)

        def back(x: np.ndarray, gradients: np.ndarray) -> None:
            observer, self.observer = self.observer, None
            self._parts.gradient_observer = observer
            try:
                with self._running(), torch.enable_grad():
                    self._weights.hold(index, index - 1)
                    for at in range(0, len(x), per_call):
                        part, self._parts.gradient_at = slice(at, at + per_call), at * n_ctx
                        read = torch.from_numpy(np.ascontiguousarray(x[part])).to(self._weights.place(index))
                        read.requires_grad_(True)
                        written = layer.run(read, slice(0, n_ctx))
                        written.backward(torch.from_numpy(np.ascontiguousarray(gradients[part])).to(read.device))
                        gradients[part] = read.grad.cpu().numpy()
            finally:
                self.observer, self._parts.gradient_observer = observer, None

        return back

    def normed(self, x: np.ndarray) -> np.ndarray:
        """What the output matrix is multiplied with, from the last layer's output `x`: a copy."""
        with self._running():
            rows = torch.from_numpy(np.ascontiguousarray(x)).to(self._device)
            result: np.ndarray = self._finished(rows).cpu().numpy()
        return result

    def input_sums(
        self, full: bool, wanted: Container[str] | None = None, balance: Balance | None = None
    ) -> TorchInputSums:
        """Sums over what the matrices are multiplied with from now on, see `TorchInputSums`."""
        sums = TorchInputSums(full, self._device, wanted, balance, stay=self.gpu is not None)
        self.observer = sums.observe
        return sums

    def replaced(self, tensors: Mapping[str, np.ndarray]) -> AbstractContextManager[None]:
        """See `Model`."""
        return self._weights.replaced(tensors)

    def scores(self, hidden: np.ndarray) -> _Logits:
        """See `Model`."""
        rows = torch.from_numpy(np.ascontiguousarray(hidden)).to(self._device)
        return _Logits(self, rows.to(self._dtype).reshape(-1, self.spec.n_embd), hidden.shape[:2])

    def staging(self, shape: tuple[int, ...]) -> np.ndarray:
        """See `Model`: a GPU copies to and from pinned memory without the processor."""
        memory: np.ndarray = torch.empty(shape, pin_memory=self._kind == "cuda").numpy()
        return memory

    def mean_divergences(
        self, base: np.ndarray, others: Sequence[tuple[np.ndarray, np.ndarray | None]]
    ) -> Sequence[float]:
        """See `Model`: logits stay on the device."""
        spec, found = self.spec, []
        for hidden, output in others:
            with self.replaced({} if output is None else {spec.output.weight: output}), self._running():
                own, other = self._parts.tensor(spec.output.weight), self._weights.matrix(spec.output.weight)
                rows = [
                    torch.from_numpy(np.ascontiguousarray(x)).to(self._device).to(self._dtype).reshape(-1, spec.n_embd)
                    for x in (base, hidden)
                ]
                step, total = max(1, _LOGITS[self._kind] // spec.n_vocab), 0.0
                for at in range(0, len(rows[0]), step):
                    part = slice(at, at + step)
                    p = self._scores(rows[0][part], 0, spec.n_vocab, own).log_softmax(1)
                    q = self._scores(rows[1][part], 0, spec.n_vocab, other).log_softmax(1)
                    total += float((p.exp() * (p - q)).sum(dtype=widest_float(self._device)))
                found.append(max(0.0, total / max(1, len(rows[0]))))
        return found

    def peak_memory(self) -> int | None:
        """The most memory, in bytes, taken until now: of the GPUs, elsewhere of this process."""
        if self._kind != "cuda":
            return peak_memory()
        return sum(int(torch.cuda.max_memory_allocated(device)) for device in self._weights.devices)

    def take_turns(self, other: Model) -> None:
        """See `Model`: layers are on the device, or dropped when the next is loaded."""

    def batch(self, n_ctx: int) -> int:
        """How many sequences of `n_ctx` tokens to run together: enough to fill the device, bounded by its memory."""
        widest = max((layer.numbers for layer in self._layers), default=0)
        per_token = 4 * (6 * self.spec.width + widest)
        free = self._weights.free() // 2 if self._kind == "cuda" else self.memory // 2
        wanted = _TOKENS[self._kind] * len(self._weights.devices)
        if self._kind == "cpu":
            wanted = max(wanted, _TOKENS_OF_A_THREAD * self.threads.count)
        return max(1, min(-(-wanted // n_ctx), int(free) // (per_token * n_ctx)))

    def open_logits(self, tokens: np.ndarray, first: int, stop: int) -> _Logits:
        """See `Model`."""
        refuse_encoder(self.spec, self.source.label)
        with self._running():
            rows = self._scored_rows(tokens, first, stop)
        return _Logits(self, rows, (len(tokens), stop - first))

    # -- the forward pass

    def _logit_blocks(self, tokens: np.ndarray, first: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Logits [rows, n_vocab], float32, of all sequences' positions below each other, and the first row's number."""
        hidden = self._scored_rows(tokens, first, stop)
        step = max(1, _LOGITS[self._kind] // self.spec.n_vocab)
        for at in range(0, len(hidden), step):
            yield at, self._scores(hidden[at : at + step], 0, self.spec.n_vocab)

    def _scored_rows(self, tokens: np.ndarray, first: int, stop: int) -> Any:
        """What the output matrix is multiplied with at positions `first` to `stop`: [all positions, n_embd]."""
        return self._hidden(tokens, first, stop).to(self._dtype).reshape(-1, self.spec.n_embd)

    def _scores(self, x: Any, start: int, stop: int, matrix: Any = None) -> Any:
        """Logits of rows of normalised `x` for the tokens `start` to `stop`: float32 [rows, tokens]."""
        spec = self.spec
        matrix = self._weights.matrix(spec.output.weight) if matrix is None else matrix
        scores = self._product_float32(x, matrix[start:stop])
        if spec.output.bias is not None:
            scores += self._parts.tensor(spec.output.bias)[start:stop]
        if spec.logit_scale != 1.0:
            scores *= spec.logit_scale
        if spec.logit_softcap is not None:
            scores = torch.tanh(scores / spec.logit_softcap) * spec.logit_softcap
        return scores

    def _product_float32(self, x: Any, weight: Any) -> Any:
        if self._kind == "cuda" and x.dtype != torch.float32 and not torch.is_grad_enabled():
            try:
                # Sums of bfloat16 products as they are, not rounded to bfloat16.
                return torch.mm(x, weight.t(), out_dtype=torch.float32)
            except TypeError:  # torch before 2.8
                pass
        return self._parts.times(x, weight).float()

    def _hidden(self, tokens: np.ndarray, first: int, stop: int) -> Any:
        """The last layer's output, normalised, at positions `first` to `stop`: float32 [n_seq, positions, n_embd]."""
        x = self._embedded(tokens)
        devices = len(self._weights.devices)
        if devices == 1:
            return self._finished(self._through(x, first, stop, self._layer_done))
        # Nothing waits for the last device before all is asked of all: while that is at a part, the first is at the
        # next one.
        parts = [self._through(part, first, stop, lambda index: None) for part in x.chunk(_PARTS * devices)]
        return torch.cat([self._finished(part.to(self._device, non_blocking=True)) for part in parts])

    def _finished(self, x: Any) -> Any:
        """The last layer's output `x` [..., width], as one stream, normalised: [..., n_embd]."""
        return self._parts.normed(self.spec.output_norm, merged(self.spec, self._parts, x))

    def _through(self, x: Any, first: int, stop: int, done: Callable[[int], None]) -> Any:
        """`x`, what the first layer reads, through all layers, at positions `first` to `stop`."""
        layers, weights = self._layers, self._weights
        span = slice(0, x.shape[1])
        for i, layer in enumerate(layers):
            if i + 1 == len(layers):
                span = slice(first, stop)
            # A batch's last layer is followed by the next batch's first.
            weights.hold(i, (i + 1) % len(layers))
            x = layer.run(x.to(weights.place(i), non_blocking=True), span)
            done(i)
        return x if layers else x[:, first:stop]

    def _embedded(self, tokens: np.ndarray) -> Any:
        """What the first layer reads for `tokens` [n_seq, n_ctx]: float32 [n_seq, n_ctx, width]."""
        spec, label = self.spec, self.source.label
        n_ctx = tokens.shape[1]
        table = self._weights.matrix(spec.embedding)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(table):
            wrong = tokens.max() if tokens.min() >= 0 else tokens.min()
            raise QuantkitError(f"{label}: token {wrong} is not one of the {len(table)} of {spec.embedding}")
        x = table[torch.from_numpy(tokens.astype(np.int64)).to(self._device)].float()
        if spec.embedding_scale != 1.0:
            x *= spec.embedding_scale
        if spec.position_embedding is not None:
            positions = self._parts.tensor(spec.position_embedding)
            if n_ctx > len(positions):
                raise QuantkitError(
                    f"{label}: sequences of {n_ctx} tokens are too long for a model that has learned "
                    f"{len(positions)} positions: use a smaller context"
                )
            x += positions[:n_ctx].float()
        if spec.segment_embedding is not None:
            x += self._parts.tensor(spec.segment_embedding)[0].float()
        x = self._parts.normed(spec.embedding_norm, x)
        return widened(spec, self._parts, x, None if spec.side is None else self._looked_up(spec.side, tokens))

    def _looked_up(self, side: SideEmbedding, tokens: np.ndarray) -> Any:
        """Embeddings of `tokens` [n_seq, n_ctx] for all layers: float32 [n_seq, n_ctx, all].

        Their table is most of what there is of a small model, and few of its rows are read: it stays on the CPU.
        """
        unique, places = np.unique(tokens, return_inverse=True)
        rows = self._weights.decoder.lookup(side.table, unique, len(self.spec.layers) * side.size)
        there = torch.from_numpy(rows).to(self._device)
        return there[torch.from_numpy(places.reshape(tokens.shape)).to(self._device)]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Run through torch: no gradients, exact float32 products, and one line where the memory is too small."""
        try:
            # Tasks of ours share the products, each on one thread of BLAS.
            with torch.no_grad(), exact_products(), self.threads.alone():
                yield
        except torch.OutOfMemoryError:
            raise self._too_small() from None

    def _too_small(self) -> QuantkitError:
        return QuantkitError(
            f"{self.source.label}: does not fit into the memory of {self.backend} in {self.precision}: "
            "use precision bf16, a smaller batch, or another device"
        )


class _Logits:
    """Logits brought to the CPU: see `model.Logits`.

    `rows` are what the output matrix is multiplied with, at `shape`, the numbers of sequences and of positions.
    """

    def __init__(self, model: TorchTransformer, rows: Any, shape: tuple[int, ...]) -> None:
        self._model, self._rows, self._shape = model, rows, shape
        self._matrix = model._weights.matrix(model.spec.output.weight)
        self.step = max(1, _LOGITS[model._kind] // max(1, len(self._rows)))

    def prepare(self, start: int, stop: int) -> None:
        """See `model.Logits`."""
        with self._model._running():
            scores = self._model._scores(self._rows, start, stop, self._matrix).cpu().numpy()
        self._start, self._scores = start, scores.reshape(*self._shape, stop - start)

    def compute(self, seqs: slice, rows: slice, start: int, stop: int, out: np.ndarray) -> None:
        """See `model.Logits`."""
        out[:] = self._scores[seqs, rows, start - self._start : stop - self._start]


def _library(kind: str) -> str:
    """What multiplies matrices for torch on this kind of device."""
    cpu = "MKL" if torch.backends.mkl.is_available() else "torch's own"
    return {"cpu": cpu, "cuda": "cuBLAS", "mps": "Metal"}[kind]


def _open_device(device: str, kind: str) -> Any:
    """The torch device. Raises QuantkitError when this machine, or this torch, does not have it."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[kind]:
        raise QuantkitError(f"torch {torch.__version__} finds no {kind} device here: use cpu")
    try:
        opened = torch.device(device)
        torch.zeros(1, device=opened)
    except RuntimeError as error:
        raise QuantkitError(f"torch cannot use the device {device!r}: {str(error).splitlines()[0]}") from None
    return opened
