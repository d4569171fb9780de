"""The forward pass through torch: on a CPU with bfloat16 units, or on a GPU.

The same description is carried out as in `transformer`. Products run in the precision that is asked for; norms, rotary
embeddings, the residual stream and the log-softmax are float32 in either. float32 products never use TF32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np

from quantkit.architectures.forward import (
    XIELU,
    Activation,
    Attention,
    Experts,
    FeedForward,
    ForwardSpec,
    Gating,
    Layer,
    Linear,
    Mixer,
    Norm,
    NormKind,
    Rope,
    RopeStyle,
    Temperature,
    Yarn,
)
from quantkit.errors import QuantkitError
from quantkit.evaluate.inputs import Balance, InputSum, Key, Sums
from quantkit.evaluate.layers import NEAR
from quantkit.evaluate.model import Model
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.threads import blas_name
from quantkit.evaluate.transformer import refuse_unsupported, rope_tables
from quantkit.evaluate.weights import Weights
from quantkit.machine import peak_memory
from quantkit.sources.source import TensorSource

try:
    import torch
    from torch.nn import functional

    from quantkit.evaluate.torch_blocks import DECODABLE, decode
except ImportError as error:
    raise QuantkitError(
        f"the torch backend needs the package torch ({error}): install it with pip install 'quantkit[torch]'"
    ) from None

log = logging.getLogger(__name__)

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# Logits that stand in memory together.
_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28, "mps": 1 << 26}
# Tokens that go through the layers together.
_TOKENS = {"cpu": 1024, "cuda": 32768, "mps": 8192}
# Parts of a batch for each of several devices.
_PARTS = 4
# Of what a GPU has free, the weights' share, and the bytes of packed weights that go over together.
_SHARE_OF_WEIGHTS = 0.8
_PACKED = 1 << 26
# Tokens for each thread of a CPU: their activations stay near its processor.
_TOKENS_OF_A_THREAD = 512

# What a sum of shares is at least when they are divided by it, as in the kernels.
_LEAST_SUM = 6.103515625e-5

# The fields of the description that this backend carries out. One that is added to the description later is refused
# by name where a model uses it.
_KNOWN: dict[type, str] = {
    ForwardSpec: "architecture n_vocab n_embd n_ctx_train embedding layers output_norm output embedding_scale "
    "position_embedding logit_scale logit_softcap",
    Layer: "mixers feed_forward attention_norm feed_forward_norm post_attention_norm post_feed_forward_norm "
    "parallel branch_scale",
    Attention: "n_head n_head_kv head_k head_v scale out q k v qkv rope window softcap q_norm k_norm norm_whole "
    "temperature norm_rotated clamp chunk sinks",
    XIELU: "alpha_n alpha_p beta eps",
    Temperature: "scale step offset",
    FeedForward: "n_ff down activation up gate gate_up",
    Experts: "n_ff n_expert n_used router gate up down activation gating selection_bias n_groups n_groups_used "
    "normalised scale weigh_input gate_bias up_bias down_bias shared shared_gate",
    Rope: "n_dims freq_base style freq_scale magnitude factors long_factors n_ctx_orig yarn",
    Yarn: "ext_factor beta_fast beta_slow",
    Norm: "weight eps kind bias",
    Linear: "weight bias",
}


def unknown_parts(value: object) -> Iterator[str]:
    """What of a description this backend does not carry out: names as `Attention.window`."""
    if isinstance(value, tuple):
        for item in value:
            yield from unknown_parts(item)
    elif is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Mixer) and type(value) not in _KNOWN:
            yield f"layers of {type(value).__name__}"
            return
        known = _KNOWN.get(type(value), "").split()
        for field in fields(value):
            own = getattr(value, field.name)
            if field.name in known:
                yield from unknown_parts(own)
            elif field.default is MISSING or own != field.default:
                yield f"{type(value).__name__}.{field.name} = {own!r}"


def attentions(layer: Layer) -> list[Attention]:
    """The mixers of `layer`: all that this backend knows are attention."""
    return [mixer for mixer in layer.mixers if isinstance(mixer, Attention)]


def _activate(activation: Activation | XIELU, x: Any) -> Any:
    if isinstance(activation, XIELU):
        positive, negative = (
            functional.softplus(torch.tensor(a)).item() for a in (activation.alpha_p, activation.alpha_n)
        )
        below = torch.expm1(x.clamp(max=activation.eps)) - x
        return torch.where(x > 0, positive * x * x, (activation.beta + negative) * below) + activation.beta * x
    if activation is Activation.RELU_SQUARED:
        return functional.relu(x).square()
    if activation is Activation.SILU:
        return functional.silu(x)
    if activation is Activation.GELU:
        return functional.gelu(x, approximate="tanh")
    raise QuantkitError(f"the torch backend does not know the activation {activation.name}")


def _gated(activation: Activation | XIELU, gate: Any, up: Any) -> Any:
    if activation is Activation.CLAMPED_SILU:
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return _activate(activation, gate) * up


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
        # The first has the embedding and the output matrix, and what is asked for.
        self._devices = [_open_device(each, self._kind) for each in device.split(",")]
        self._device = self._devices[0]
        self.gpu = self._device if self._kind == "cuda" else None
        self._dtype = _DTYPES[precision]
        self._keep, self._held, self._packs = keep and self._fits(), -1, self._kind == "cuda"
        if not self._keep:
            del self._devices[1:]
        # The layer that is being fetched, by a thread and in a stream of its own.
        self._coming: tuple[int, Future[dict[str, Any]]] | None = None
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="quantkit-fetch")
        self._side = torch.cuda.Stream(self._device) if self._kind == "cuda" else None
        self.backend, self.precision = f"torch {device}", precision
        # torch brings MKL, which leaves AVX-512 unused on other processors than Intel's; numpy's BLAS does not.
        self._through_numpy = self._kind == "cpu" and self._dtype == torch.float32
        self.blas = blas_name() if self._through_numpy else _library(self._kind)
        refuse_unsupported(self.spec, source.label)
        for part in unknown_parts(self.spec):
            raise QuantkitError(f"{source.label}: the torch backend does not know {part}: use the default backend")
        if self._kind == "cpu":
            torch.set_num_threads(self.threads.count)
        self._tensors: dict[str, Any] = {}
        self._outer: dict[str, Any] = {}
        self._weights = Weights(source, self.threads.run, keep=False)
        self._others: dict[str, Any] = {}
        self._tables: dict[tuple[Rope, str | None, int, Any], tuple[Any, Any]] = {}
        self._gradient_observer: Callable[..., None] | None = None
        with self._running():
            self._load()

    # -- what callers ask for

    def log_likelihoods(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        """The natural log of the probability of each token from position `first` + 1 on, given those before it.

        `tokens` is int32 [n_seq, n_ctx]; the result float64 [n_seq, n_ctx - 1 - first].
        """
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
        """What the first layer reads for `tokens` [n_seq, n_ctx]: float32 [n_seq, n_ctx, n_embd]."""
        with self._running():
            result: np.ndarray = self._embedded(tokens).cpu().numpy()
        return result

    def layer_pass(self, index: int, n_ctx: int) -> Callable[[np.ndarray], None]:
        """Layer `index` as a function that carries activations [n_seq, n_ctx, n_embd] through it in place.

        Valid until the next call.
        """
        layer = self.spec.layers[index]

        def advance(x: np.ndarray) -> None:
            with self._running():
                self._hold(index)
                there = torch.from_numpy(x)
                there.copy_(self._layer(layer, there.to(self._place(index), non_blocking=True), slice(0, n_ctx)))

        return advance

    def last_gradients(self, x: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Model`."""
        spec, result = self.spec, np.empty(x.shape, np.float32)
        rows, to, places = x.reshape(-1, spec.n_embd), result.reshape(-1, spec.n_embd), draws.reshape(-1, 1)
        step = max(1, _LOGITS[self._kind] // spec.n_vocab)
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            with self._running(), torch.enable_grad():
                read = torch.from_numpy(np.ascontiguousarray(rows[part])).to(self._device).requires_grad_(True)
                scores = self._scores(self._normed(spec.output_norm, read).to(self._dtype), 0, spec.n_vocab)
                wide = _wide(self._device)
                reached = scores.detach().softmax(1).to(wide).cumsum(1)
                drawn = torch.searchsorted(
                    reached, torch.from_numpy(places[part]).to(self._device, wide), right=True
                ).clamp(max=spec.n_vocab - 1)
                functional.log_softmax(scores, 1).gather(1, drawn).sum().backward()
                to[part] = read.grad.cpu().numpy()
        return result

    def gradient_pass(self, index: int, n_ctx: int) -> Callable[[np.ndarray, np.ndarray], None]:
        """See `Model`."""
        layer, per_call = self.spec.layers[index], self.batch(n_ctx)

        def back(x: np.ndarray, gradients: np.ndarray) -> None:
            observer, self.observer = self.observer, None
            self._gradient_observer = observer
            try:
                with self._running(), torch.enable_grad():
                    self._hold(index, index - 1)
                    for at in range(0, len(x), per_call):
                        part = slice(at, at + per_call)
                        read = torch.from_numpy(np.ascontiguousarray(x[part])).to(self._place(index))
                        read.requires_grad_(True)
                        written = self._layer(layer, read, slice(0, n_ctx))
                        written.backward(torch.from_numpy(np.ascontiguousarray(gradients[part])).to(read.device))
                        gradients[part] = read.grad.cpu().numpy()
            finally:
                self.observer, self._gradient_observer = observer, None

        return back

    def normed(self, x: np.ndarray) -> np.ndarray:
        """What the output matrix is multiplied with, from the last layer's output `x`: a copy."""
        with self._running():
            rows = torch.from_numpy(np.ascontiguousarray(x)).to(self._device)
            result: np.ndarray = self._normed(self.spec.output_norm, rows).cpu().numpy()
        return result

    def input_sums(
        self, full: bool, wanted: Container[str] | None = None, balance: Balance | None = None
    ) -> TorchInputSums:
        """Sums over what the matrices are multiplied with from now on, see `TorchInputSums`."""
        sums = TorchInputSums(full, self._device, wanted, balance, stay=self.gpu is not None)
        self.observer = sums.observe
        return sums

    @contextmanager
    def replaced(self, tensors: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See `Model`."""
        shapes = {name: self.source.tensors[name].shape for name in tensors}
        self._others = {
            # Experts are stacked.
            name: torch.from_numpy(np.ascontiguousarray(rows))
            .to(self._dtype)
            .to(self._tensors[name].device if name in self._tensors else self._device)
            .view(*reversed(shapes[name]))
            for name, rows in tensors.items()
        }
        try:
            yield
        finally:
            self._others = {}

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
                other = self._weight(spec.output.weight)
                rows = [
                    torch.from_numpy(np.ascontiguousarray(x)).to(self._device).to(self._dtype).reshape(-1, spec.n_embd)
                    for x in (base, hidden)
                ]
                step, total = max(1, _LOGITS[self._kind] // spec.n_vocab), 0.0
                for at in range(0, len(rows[0]), step):
                    part = slice(at, at + step)
                    p = self._scores(rows[0][part], 0, spec.n_vocab, self._tensors[spec.output.weight]).log_softmax(1)
                    q = self._scores(rows[1][part], 0, spec.n_vocab, other).log_softmax(1)
                    total += float((p.exp() * (p - q)).sum(dtype=_wide(self._device)))
                found.append(max(0.0, total / max(1, len(rows[0]))))
        return found

    def peak_memory(self) -> int | None:
        """The most memory, in bytes, taken until now: of the GPUs, elsewhere of this process."""
        if self._kind != "cuda":
            return peak_memory()
        return sum(int(torch.cuda.max_memory_allocated(device)) for device in self._devices)

    def take_turns(self, other: Model) -> None:
        """See `Model`: layers are on the device, or dropped when the next is loaded."""

    def batch(self, n_ctx: int) -> int:
        """How many sequences of `n_ctx` tokens to run together: enough to fill the device, bounded by its memory."""
        widest = max((self._width(layer) for layer in self.spec.layers), default=0)
        per_token = 4 * (6 * self.spec.n_embd + widest)
        free = self._free() // 2 if self._kind == "cuda" else self.memory // 2
        wanted = _TOKENS[self._kind] * len(self._devices)
        if self._kind == "cpu":
            wanted = max(wanted, _TOKENS_OF_A_THREAD * self.threads.count)
        return max(1, min(-(-wanted // n_ctx), int(free) // (per_token * n_ctx)))

    def open_logits(self, tokens: np.ndarray, first: int, stop: int) -> _Logits:
        """See `Model`."""
        with self._running():
            rows = self._scored_rows(tokens, first, stop)
        return _Logits(self, rows, (len(tokens), stop - first))

    # -- weights

    def _load(self) -> None:
        """Put what the forward pass reads on the device; of the layers only if all are kept."""
        spec, to, device = self.spec, self._tensors, self._device
        self._lookup(spec.embedding, to, device)
        if spec.position_embedding is not None:
            self._lookup(spec.position_embedding, to, device)
        self._norm_weights(spec.output_norm, spec.n_embd, to, device)
        self._linear_weights(spec.output, spec.n_vocab, spec.n_embd, to, device)
        self._outer = dict(to)
        for index, layer in enumerate(spec.layers if self._keep else ()):
            self._load_layer(layer, to, self._place(index))

    def _place(self, index: int) -> Any:
        """The device that has layer `index`: neighbours are together."""
        if not self._keep:
            return self._device
        return self._devices[index * len(self._devices) // len(self.spec.layers)]

    def _free(self) -> int:
        """The bytes that are free on the fullest GPU."""
        return min(int(torch.cuda.mem_get_info(device)[0]) for device in self._devices)

    def _fits(self) -> bool:
        """Whether the device has room for all weights, and for the activations beside them."""
        if self._kind != "cuda":
            return True
        needed = sum(info.n_elements for info in self.source.tensors.values()) * self._dtype.itemsize
        free = self._free() * len(self._devices)
        if needed > _SHARE_OF_WEIGHTS * free:
            log.info(
                "%s: %.1f GB of weights and the activations do not fit into the %.1f GB that %s has free: its layers "
                "come and go",
                self.source.label, needed / 1e9, free / 1e9, self.backend,
            )  # fmt: skip
            return False
        return True

    def _hold(self, index: int, after: int | None = None) -> None:
        """See that the weights of layer `index` are on the device, alone of the layers unless all are kept.

        Those of the layer `after` it, the next where None, are fetched meanwhile.
        """
        if self._keep or index == self._held:
            return
        # What was held can go before the next is there.
        self._tensors, self._held = self._outer, -1
        coming, self._coming = self._coming, None
        if self._side is None:
            own = self._fetched(index)
        else:
            if coming is None or coming[0] != index:
                coming = index, self._fetcher.submit(self._fetched, index)
            own = coming[1].result()
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._side)
            for tensor in own.values():
                tensor.record_stream(current)
            following = index + 1 if after is None else after
            if 0 <= following < len(self.spec.layers):
                self._coming = following, self._fetcher.submit(self._fetched, following)
        self._tensors, self._held = {**self._outer, **own}, index

    def _fetched(self, index: int) -> dict[str, Any]:
        """The weights of layer `index`, on the device. Several threads may not call this."""
        own: dict[str, Any] = {}
        with torch.no_grad(), torch.cuda.stream(self._side):  # that of None is the usual one
            self._load_layer(self.spec.layers[index], own, self._device)
        return own

    def _load_layer(self, layer: Layer, to: dict[str, Any], device: Any) -> None:
        ff, n_embd = layer.feed_forward, self.spec.n_embd
        for norm in (
            layer.attention_norm, layer.feed_forward_norm, layer.post_attention_norm, layer.post_feed_forward_norm
        ):  # fmt: skip
            self._norm_weights(norm, n_embd, to, device)
        for a in attentions(layer):
            n_q, n_k, n_v = a.n_head * a.head_k, a.n_head_kv * a.head_k, a.n_head_kv * a.head_v
            if a.sinks is not None:
                self._vector(a.sinks, a.n_head, to, device)
            self._norm_weights(a.q_norm, n_q if a.norm_whole else a.head_k, to, device)
            self._norm_weights(a.k_norm, n_k if a.norm_whole else a.head_k, to, device)
            for linear, n_out in ((a.qkv, n_q + n_k + n_v), (a.q, n_q), (a.k, n_k), (a.v, n_v)):
                self._linear_weights(linear, n_out, n_embd, to, device)
            self._linear_weights(a.out, n_embd, a.n_head * a.head_v, to, device)
        dense = ff.shared if isinstance(ff, Experts) else ff
        if dense is not None:
            for linear, n_out in ((dense.gate_up, 2 * dense.n_ff), (dense.gate, dense.n_ff), (dense.up, dense.n_ff)):
                self._linear_weights(linear, n_out, n_embd, to, device)
            self._linear_weights(dense.down, n_embd, dense.n_ff, to, device)
        if isinstance(ff, Experts):
            self._linear_weights(ff.router, ff.n_expert, n_embd, to, device)
            self._linear_weights(ff.shared_gate, 1, n_embd, to, device)
            if ff.selection_bias is not None:
                self._vector(ff.selection_bias, ff.n_expert, to, device)
            for name, biases, n_out, n_in in (
                (ff.gate, ff.gate_bias, ff.n_ff, n_embd),
                (ff.up, ff.up_bias, ff.n_ff, n_embd),
                (ff.down, ff.down_bias, n_embd, ff.n_ff),
            ):
                if name is not None:
                    self._matrix(name, ff.n_expert * n_out, n_in, to, device)
                if biases is not None:
                    self._matrix(biases, ff.n_expert, n_out, to, device)

    def _matrix(self, name: str, n_rows: int, n_in: int, to: dict[str, Any], device: Any) -> None:
        if name in to:
            return
        info = self.source.tensors.get(name)
        if not self._packs or info is None or info.type not in DECODABLE:
            decoded = torch.from_numpy(self._weights.matrix("any", [(name, n_rows)], n_in))
            to[name] = decoded.to(self._dtype).to(device, copy=True)
            return
        # Packed weights are fewer bytes, and the device decodes them in no time.
        self._weights.check(name, n_rows, n_in)
        whole = torch.empty((n_rows, n_in), dtype=self._dtype, device=device)
        step = max(1, _PACKED // info.type.row_nbytes(n_in))
        for start in range(0, n_rows, step):
            packed = self._packed(name, start, min(n_rows, start + step))
            whole[start : start + step] = decode(packed.to(device, non_blocking=True), info.type, self._dtype)
        to[name] = whole
        self.source.release(name)

    def _packed(self, name: str, start: int, stop: int) -> Any:
        """Rows of a tensor as they are stored, in memory that a GPU reads by itself."""
        rows = self.source.read(name, start, stop)
        pinned = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=self._kind == "cuda")
        into, step = pinned.numpy(), max(1, -(-len(rows) // self.threads.count))

        def copy(at: int) -> None:
            into[at : at + step] = rows[at : at + step]

        for _ in self.threads.map(copy, range(0, len(rows), step)):
            pass
        return pinned

    def _vector(self, name: str, size: int, to: dict[str, Any], device: Any) -> None:
        if name not in to:
            to[name] = torch.from_numpy(self._weights.vector(name, size)).to(device, copy=True)

    def _lookup(self, name: str, to: dict[str, Any], device: Any) -> None:
        info = self.source.tensors.get(name)
        self._matrix(name, 0 if info is None else info.n_rows, self.spec.n_embd, to, device)

    def _linear_weights(self, linear: Linear | None, n_out: int, n_in: int, to: dict[str, Any], device: Any) -> None:
        if linear is not None:
            self._matrix(linear.weight, n_out, n_in, to, device)
            if linear.bias is not None:
                self._vector(linear.bias, n_out, to, device)

    def _norm_weights(self, norm: Norm | None, size: int, to: dict[str, Any], device: Any) -> None:
        if norm is not None:
            if norm.weight is not None:
                self._vector(norm.weight, size, to, device)
            if norm.bias is not None:
                self._vector(norm.bias, size, to, device)

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

    def _weight(self, name: str) -> Any:
        """A matrix on the device, or what replaces it."""
        return self._others[name] if name in self._others else self._tensors[name]

    def _scores(self, x: Any, start: int, stop: int, matrix: Any = None) -> Any:
        """Logits of rows of normalised `x` for the tokens `start` to `stop`: float32 [rows, tokens]."""
        spec = self.spec
        matrix = self._weight(spec.output.weight) if matrix is None else matrix
        scores = self._product_float32(x, matrix[start:stop])
        if spec.output.bias is not None:
            scores += self._tensors[spec.output.bias][start:stop]
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
        return self._linear(x, weight).float()

    def _hidden(self, tokens: np.ndarray, first: int, stop: int) -> Any:
        """The last layer's output, normalised, at positions `first` to `stop`: float32 [n_seq, positions, n_embd]."""
        x = self._embedded(tokens)
        if len(self._devices) == 1:
            return self._finished(self._through(x, first, stop, self._layer_done))
        # Nothing waits for the last device before all is asked of all: while that is at a part, the first is at the
        # next one.
        parts = [self._through(part, first, stop, lambda index: None) for part in x.chunk(_PARTS * len(self._devices))]
        return torch.cat([self._finished(part.to(self._device, non_blocking=True)) for part in parts])

    def _finished(self, x: Any) -> Any:
        """The last layer's output `x`, normalised."""
        return self._normed(self.spec.output_norm, x)

    def _through(self, x: Any, first: int, stop: int, done: Callable[[int], None]) -> Any:
        """`x`, what the first layer reads, through all layers, at positions `first` to `stop`."""
        spec = self.spec
        span = slice(0, x.shape[1])
        for i, layer in enumerate(spec.layers):
            if i + 1 == len(spec.layers):
                span = slice(first, stop)
            # A batch's last layer is followed by the next batch's first.
            self._hold(i, (i + 1) % len(spec.layers))
            x = self._layer(layer, x.to(self._place(i), non_blocking=True), span)
            done(i)
        return x if spec.layers else x[:, first:stop]

    def _embedded(self, tokens: np.ndarray) -> Any:
        """What the first layer reads for `tokens` [n_seq, n_ctx]: float32 [n_seq, n_ctx, n_embd]."""
        spec, label = self.spec, self.source.label
        n_ctx = tokens.shape[1]
        table = self._weight(spec.embedding)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(table):
            wrong = tokens.max() if tokens.min() >= 0 else tokens.min()
            raise QuantkitError(f"{label}: token {wrong} is not one of the {len(table)} of {spec.embedding}")
        x = table[torch.from_numpy(tokens.astype(np.int64)).to(self._device)].float()
        if spec.embedding_scale != 1.0:
            x *= spec.embedding_scale
        if spec.position_embedding is not None:
            positions = self._tensors[spec.position_embedding]
            if n_ctx > len(positions):
                raise QuantkitError(
                    f"{label}: sequences of {n_ctx} tokens are too long for a model that has learned "
                    f"{len(positions)} positions: use a smaller context"
                )
            x += positions[:n_ctx].float()
        return x

    def _layer(self, layer: Layer, x: Any, span: slice) -> Any:
        """`x` [n_seq, n_ctx, n_embd] after `layer`, at the positions of `span`."""
        normed = self._normed(layer.attention_norm, x).to(self._dtype)
        branches = [self._products(self._attention(a, normed, span), a.out)[0].float() for a in attentions(layer)]
        x = x[:, span]
        after = x
        if branches:
            after = x + self._normed(layer.post_attention_norm, sum(branches)) * layer.branch_scale
        if layer.feed_forward is None:
            return after
        normed = self._normed(layer.feed_forward_norm, x if layer.parallel else after).to(self._dtype)
        ff = layer.feed_forward
        branch = self._dense(ff, normed) if isinstance(ff, FeedForward) else self._experts(ff, normed)
        return after + self._normed(layer.post_feed_forward_norm, branch.float()) * layer.branch_scale

    def _attention(self, a: Attention, x: Any, span: slice) -> Any:
        """Attention at the positions of `span`, before its output product: [n_seq, positions, heads * head size]."""
        n_seq, n_ctx, _ = x.shape
        n_q, n_k = a.n_head * a.head_k, a.n_head_kv * a.head_k
        if a.qkv is not None:
            (whole,) = self._products(x, a.qkv)
            q, k, v = whole.split([n_q, n_k, a.n_head_kv * a.head_v], dim=2)
        else:
            q, k, v = self._products(x, a.q, a.k, a.v)
        if a.clamp is not None:
            q, k, v = (y.clamp(-a.clamp, a.clamp) for y in (q, k, v))

        def heads(y: Any, n_head: int, norm: Norm | None) -> Any:
            if norm is not None and a.norm_whole:
                y = self._normed(norm, y.float())
            y = y.reshape(n_seq, n_ctx, n_head, -1)
            if norm is not None and not a.norm_whole and not a.norm_rotated:
                y = self._normed(norm, y.float())
            y = self._rotated(a.rope, y, n_ctx)
            if norm is not None and a.norm_rotated:
                y = self._normed(norm, y.float())
            return y.to(self._dtype).transpose(1, 2)

        if a.temperature is not None:
            steps = (torch.arange(n_ctx, device=x.device) + a.temperature.offset) // a.temperature.step
            growth = 1 + a.temperature.scale * torch.log(steps.float() + 1)
            q = heads(q, a.n_head, a.q_norm) * growth[:, None].to(self._dtype)
        else:
            q = heads(q, a.n_head, a.q_norm)
        q, k = q[:, :, span], heads(k, a.n_head_kv, a.k_norm)
        v = v.reshape(n_seq, n_ctx, a.n_head_kv, a.head_v).transpose(1, 2)
        if a.n_head != a.n_head_kv:
            k, v = (y.repeat_interleave(a.n_head // a.n_head_kv, dim=1) for y in (k, v))
        whole = q.shape[2] == n_ctx
        mask: Any = None
        plain = a.softcap is None and a.sinks is None
        if not whole or a.window is not None or a.chunk is not None or not plain:
            positions = torch.arange(n_ctx, device=x.device)
            distance = positions[span, None] - positions
            mask = distance >= 0 if a.window is None else (distance >= 0) & (distance < a.window)
            if a.chunk is not None:
                mask &= positions // a.chunk == positions[span, None] // a.chunk
        if plain:
            mixed = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=a.scale
            )
        else:
            scores = (q @ k.transpose(2, 3)).float() * a.scale
            if a.softcap is not None:
                scores = torch.tanh(scores / a.softcap) * a.softcap
            scores = scores.masked_fill(~mask, -torch.inf)
            if a.sinks is not None:
                sinks = self._tensors[a.sinks][None, :, None, None].expand(n_seq, -1, scores.shape[2], 1)
                scores = torch.cat([scores, sinks], dim=3).softmax(3)[..., :-1]
            else:
                scores = scores.softmax(3)
            mixed = scores.to(self._dtype) @ v
        return mixed.transpose(1, 2).reshape(n_seq, -1, a.n_head * a.head_v)

    def _rotated(self, rope: Rope | None, x: Any, n_ctx: int) -> Any:
        """`x` [n_seq, n_ctx, heads, head size] rotated by its positions, in float32."""
        if rope is None or rope.n_dims == 0:
            return x
        cosines, sines = self._rope(rope, n_ctx, x.device)
        rotary, rest = x[..., : rope.n_dims].float(), x[..., rope.n_dims :]
        if rope.style is RopeStyle.NORMAL:
            a, b = rotary[..., 0::2], rotary[..., 1::2]
        else:
            a, b = rotary.chunk(2, dim=3)
        rotated = a * cosines - b * sines, a * sines + b * cosines
        neighbours = rope.style is RopeStyle.NORMAL
        result = torch.stack(rotated, dim=4).flatten(3) if neighbours else torch.cat(rotated, dim=3)
        return torch.cat((result, rest.float()), dim=3) if rest.shape[3] else result

    def _rope(self, rope: Rope, n_ctx: int, device: Any) -> tuple[Any, Any]:
        """Cosines and sines [n_ctx, 1, n_dims / 2]."""
        long = rope.long_factors is not None and n_ctx > rope.n_ctx_orig
        name = rope.long_factors if long else rope.factors
        key = rope, name, n_ctx, device
        if key not in self._tables:
            factors = None if name is None else self._weights.vector(name, rope.n_dims // 2)
            cosines, sines = (torch.from_numpy(t[:, None]) for t in rope_tables(rope, n_ctx, factors))
            self._tables[key] = cosines.to(device), sines.to(device)
        return self._tables[key]

    def _dense(self, ff: FeedForward, x: Any) -> Any:
        if ff.gate_up is not None:
            (wide,) = self._products(x, ff.gate_up)
            gate, up = wide.chunk(2, dim=2)
            active = _gated(ff.activation, gate, up)
        elif ff.gate is not None:
            gate, up = self._products(x, ff.gate, ff.up)
            active = _gated(ff.activation, gate, up)
        else:
            (up,) = self._products(x, ff.up)
            active = _activate(ff.activation, up)
        (branch,) = self._products(active, ff.down)
        return branch

    def _experts(self, ff: Experts, x: Any) -> Any:
        rows = x.reshape(-1, x.shape[2])
        (logits,) = self._products(rows, ff.router)
        chosen, shares = self._route(ff, logits.float())
        branch = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        if ff.shared is not None:
            branch += self._dense(ff.shared, x).reshape(rows.shape)
        if ff.shared_gate is not None:
            (gate,) = self._products(rows, ff.shared_gate)
            branch *= gate.float().sigmoid()
        assert ff.up is not None
        for e in range(ff.n_expert):
            some, rank = torch.nonzero(chosen == e, as_tuple=True)
            share = shares[some, rank, None]
            y = rows[some]
            if ff.weigh_input:
                y = y * share.to(y.dtype)
            self._observe((ff.up,) if ff.gate is None else (ff.gate, ff.up), y, e, some)
            up = self._expert(ff, ff.up, ff.up_bias, e, y)
            if ff.gate is None:
                y = _activate(ff.activation, up)
            else:
                y = _gated(ff.activation, self._expert(ff, ff.gate, ff.gate_bias, e, y), up)
            self._observe((ff.down,), y, e, some)
            y = self._expert(ff, ff.down, ff.down_bias, e, y).float()
            branch.index_add_(0, some, y if ff.weigh_input else y * share)
        return branch.reshape(x.shape)

    def _expert(self, ff: Experts, name: str, biases: str | None, e: int, x: Any) -> Any:
        bias = None if biases is None else self._weight(biases)[e]
        return self._linear(x, self._weight(name).view(ff.n_expert, -1, x.shape[1])[e], bias)

    def _route(self, ff: Experts, logits: Any) -> tuple[Any, Any]:
        """The experts that each row of `logits` [rows, experts] chooses, and their shares: [rows, experts used]."""
        if ff.gating is Gating.SPARSE_MIXER:
            return self._route_sparsely(ff.n_used, logits)
        if ff.gating is Gating.SIGMOID:
            shares = logits.sigmoid()
        else:
            shares = logits if ff.gating is Gating.CHOSEN else logits.softmax(1)
        # Where nothing is added to the shares, the logits are in their order, and do not become equal near 0 and 1.
        plain = ff.selection_bias is None and ff.n_groups == 1
        scores = logits if plain else shares
        if ff.selection_bias is not None:
            scores = scores + self._tensors[ff.selection_bias]
        if ff.n_groups > 1:
            groups = scores.view(len(scores), ff.n_groups, -1)
            best = groups.topk(min(2, groups.shape[2]), dim=2)[0].sum(2).topk(ff.n_groups_used, dim=1)[1]
            left_out = torch.ones(groups.shape[:2], dtype=torch.bool, device=groups.device).scatter(1, best, False)
            scores = groups.masked_fill(left_out[:, :, None], -torch.inf).view(scores.shape)
        chosen = scores.topk(ff.n_used, dim=1)[1]
        shares = shares.gather(1, chosen)
        if ff.gating is Gating.CHOSEN:
            shares = shares.softmax(1)
        elif ff.normalised:
            shares = shares / shares.sum(1, keepdim=True).clamp(min=_LEAST_SUM)
        return chosen, shares * ff.scale

    def _route_sparsely(self, n_used: int, logits: Any) -> tuple[Any, Any]:
        """See `forward_kernels.route_sparsely`."""
        left, chosen, shares = logits, [], []
        for _ in range(n_used):
            best, index = left.max(1, keepdim=True)
            far = (best - logits) / torch.maximum(logits.abs(), best) > NEAR
            shares.append(left.masked_fill(far, -torch.inf).softmax(1).gather(1, index))
            chosen.append(index)
            left = left.scatter(1, index, -torch.inf)
        return torch.cat(chosen, 1), torch.cat(shares, 1)

    def _products(self, x: Any, *linears: Linear | None) -> list[Any]:
        """`x` [..., n_in] through each of `linears`."""
        present = [linear for linear in linears if linear is not None]
        self._observe(tuple(linear.weight for linear in present), x)
        products = [
            self._linear(
                x,
                self._weight(linear.weight),
                None if linear.bias is None else self._tensors[linear.bias].to(x.dtype),
            )
            for linear in present
        ]
        if self._gradient_observer is not None:
            for linear, product in zip(present, products, strict=True):
                product.register_hook(partial(self._gradient, self._gradient_observer, linear.weight))
        return products

    @staticmethod
    def _gradient(observer: Callable[..., None], name: str, gradient: Any) -> None:
        with torch.no_grad():
            observer((name,), gradient.reshape(-1, gradient.shape[-1]), 0, None)

    def _linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """`x` [..., n_in] times the rows of `weight`, plus `bias`."""
        if not self._through_numpy or torch.is_grad_enabled():
            return functional.linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(len(rows), len(weight))
        step = max(1, -(-len(rows) // self.threads.count))
        a, w, to = rows.numpy(), weight.numpy().T, out.numpy()

        def multiply(i: int) -> None:
            part = slice(i * step, (i + 1) * step)
            np.matmul(a[part], w, out=to[part])

        for _ in self.threads.map(multiply, range(-(-len(rows) // step))):
            pass
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], len(weight))

    def _observe(self, names: tuple[str, ...], x: Any, expert: int | None = None, at: Any = 0) -> None:
        if self.observer is not None and x.numel():
            self.observer(names, x.reshape(-1, x.shape[-1]), at, expert)

    def _normed(self, norm: Norm | None, x: Any) -> Any:
        """`x` normalised over its last axis, float32."""
        if norm is None:
            return x
        weight = None if norm.weight is None else self._tensors[norm.weight]
        if norm.kind is NormKind.RMS:
            return functional.rms_norm(x, x.shape[-1:], weight, norm.eps)
        bias = None if norm.bias is None else self._tensors[norm.bias]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)

    @staticmethod
    def _width(layer: Layer) -> int:
        """Numbers that one token's activations hold in a layer, about."""
        mixed = sum(6 * a.n_head * max(a.head_k, a.head_v) for a in attentions(layer))
        return mixed + (0 if layer.feed_forward is None else 4 * layer.feed_forward.n_ff)

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
        self._matrix = model._weight(model.spec.output.weight)
        self.step = max(1, _LOGITS[model._kind] // max(1, len(self._rows)))

    def prepare(self, start: int, stop: int) -> None:
        """See `model.Logits`."""
        with self._model._running():
            scores = self._model._scores(self._rows, start, stop, self._matrix).cpu().numpy()
        self._start, self._scores = start, scores.reshape(*self._shape, stop - start)

    def compute(self, seqs: slice, rows: slice, start: int, stop: int, out: np.ndarray) -> None:
        """See `model.Logits`."""
        out[:] = self._scores[seqs, rows, start - self._start : stop - self._start]


class TorchInputSums:
    """Sums over the inputs of matrices on torch's device, as `inputs.InputSums` on the CPU.

    Products and squares of a part of a batch are summed in float32, the parts in float64 where the device has it.
    Sums of products `stay` where they are when they are taken, if told so.
    """

    def __init__(
        self,
        full: bool,
        device: Any,
        wanted: Container[str] | None = None,
        balance: Balance | None = None,
        stay: bool = False,
    ) -> None:
        self._full, self._device, self._wanted, self._stay = full, device, wanted, stay and full
        self._balance = balance
        self._wide = _wide(device)
        self._totals: dict[Key, Any] = {}
        self._counts: dict[Key, int] = {}

    def observe(self, names: tuple[str, ...], rows: Any, at: Any, expert: int | None) -> None:
        """Take torch's `rows`, which tensors `names` are multiplied with; for `at` see `parts.Observer`."""
        if self._wanted is not None and not any(name in self._wanted for name in names):
            return
        key = names, expert
        if self._full:
            rows = rows.float()
            if self._balance is not None:
                rows = self._balanced(rows, at, self._balance)
            sums = (rows.t() @ rows).to(self._wide)
        else:
            # One reading of the rows, whatever they are.
            sums = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).to(self._wide).square()
        if key in self._totals:
            self._totals[key] += sums
        else:
            self._totals[key] = sums
        self._counts[key] = self._counts.get(key, 0) + len(rows)

    def _balanced(self, rows: Any, at: Any, balance: Balance) -> Any:
        """See `inputs.Balance.balanced`."""
        places = at if isinstance(at, torch.Tensor) else at + torch.arange(len(rows), device=rows.device)
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=self._wide)
        sizes = torch.where(places % balance.n_ctx == 0, balance.first**0.5, 1.0).to(lengths)
        scales = torch.where(lengths > 0, sizes / lengths, lengths)
        return rows * scales.float()[:, None]

    def add(self, names: tuple[str, ...], rows: np.ndarray, at: int = 0) -> None:
        """See `inputs.Sums`."""
        with torch.no_grad(), exact_products():
            self.observe(names, torch.from_numpy(rows).to(self._device), at, None)

    def settle(self) -> None:
        """See `inputs.Sums`: nothing waits."""

    def take_groups(self, n_rows: int) -> list[dict[Key, InputSum]]:
        """See `inputs.Sums`: one of the whole batch."""
        return [self.take()]

    def take(self) -> dict[Key, InputSum]:
        """See `inputs.Sums`."""
        totals, self._totals = self._totals, {}
        counts, self._counts = self._counts, {}
        if not self._stay:
            totals = {key: total.cpu().numpy().astype(np.float64) for key, total in totals.items()}
        return {key: InputSum(total, counts[key]) for key, total in totals.items()}


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products without TF32, whatever the process asked for before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _wide(device: Any) -> Any:
    """The widest floats that `device` has."""
    return torch.float32 if device.type == "mps" else torch.float64


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
