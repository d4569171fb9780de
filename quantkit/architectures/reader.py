"""What most families read alike from a GGUF model for its forward pass, each field as llama.cpp reads it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from quantkit.architectures.feed_forward import XIELU, Activation, Experts, FeedForward, Gating
from quantkit.architectures.forward import (
    MAX_HEAD,
    MAX_LAYERS,
    ForwardSpec,
    Head,
    Layer,
    Pooling,
    SideEmbedding,
    SideInput,
)
from quantkit.architectures.mixers import Attention, Mixer, Rope, RopeStyle, SharedKeys, Yarn
from quantkit.architectures.products import Linear, Norm, NormKind
from quantkit.architectures.recurrent_mixers import Convolution, Mamba, Mamba2
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import INTEGERS, Metadata, TensorInfo, ValueType

# A bound on sizes that no model comes near.
MAX_SIZE = 1 << 28
_GATINGS = {1: Gating.SOFTMAX, 2: Gating.SIGMOID, 3: Gating.CHOSEN}
_SCALINGS = ("none", "linear", "yarn", "longrope")


class ModelReader:
    """A GGUF model's metadata and tensor list, read into the parts of a ForwardSpec.

    Keys are given without the architecture's prefix. Methods that make a part take `changes`: fields of that part for
    what a family does otherwise. All raise QuantkitError for metadata that lacks or contradicts what they need.
    """

    def __init__(
        self,
        metadata: Metadata,
        tensors: Mapping[str, TensorInfo],
        norm_kind: NormKind = NormKind.RMS,
        eps_key: str | None = None,
    ) -> None:
        """Read the sizes. `norm_kind` is the kind of all norms, `eps_key` where their epsilon is, if elsewhere."""
        self.metadata, self.tensors, self.norm_kind = metadata, tensors, norm_kind
        self.arch = metadata.architecture
        self.n_embd = self.integer("embedding_length", low=1)
        self.n_layer = self.integer("block_count", low=1, high=MAX_LAYERS)
        if self.n_layer > len(tensors):
            raise QuantkitError(
                f"the metadata says {self.n_layer} layers, which the model's {len(tensors)} tensors cannot hold"
            )
        self.n_listed, n_next = self.n_layer, self.integer("nextn_predict_layers", 0)
        if n_next >= self.n_layer:
            raise QuantkitError(f"the metadata says {n_next} of {self.n_layer} layers predict several tokens")
        self.n_layer -= n_next
        self.heads = self.per_layer("attention.head_count")
        self.heads_kv = self.per_layer("attention.head_count_kv", 0)
        # Layers without attention have no heads.
        size = self.n_embd // max(1, next(filter(None, self.heads), 1))
        self.head_k = self.integer("attention.key_length", size)
        self.head_v = self.integer("attention.value_length", size)
        if min(self.head_k, self.head_v) < 1:
            raise QuantkitError(
                f"the metadata says {self.n_embd} numbers a token and heads of {self.head_k} and {self.head_v}"
            )
        eps = eps_key or ("layer_norm_rms_epsilon" if norm_kind is NormKind.RMS else "layer_norm_epsilon")
        self.eps = self.number(f"attention.{eps}")
        self.causal = self.flag("attention.causal", True)

    # Values

    def integer(self, key: str, default: int | None = None, low: int = 0, high: int = MAX_SIZE) -> int:
        """A whole number from `low` to `high`, `default` where there is none; required without a default."""
        return self.metadata.integer(f"{self.arch}.{key}", low, high, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, `default` where there is none; required without a default."""
        return self.metadata.number(f"{self.arch}.{key}", default=default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A truth value, `default` where there is none; required without a default."""
        return self.metadata.flag(f"{self.arch}.{key}", default)

    def per_layer(self, key: str, default: int | None = None, low: int = 0) -> list[int]:
        """A count that stands once for all layers, or in an array with one for each; required without a default."""
        full = f"{self.arch}.{key}"
        if self.metadata.is_array(full):
            return self.metadata.integers(full, self.n_listed, low, MAX_SIZE)
        return [self.integer(key, default, low)] * self.n_listed

    def per_layer_numbers(self, key: str, prefixed: bool = True) -> list[float]:
        """A number that stands once for all layers, or in an array with one for each; required.

        The key has the architecture's prefix unless `prefixed` is False.
        """
        key = f"{self.arch}.{key}" if prefixed else key
        if self.metadata.is_array(key):
            return self.metadata.numbers(key, self.n_listed)
        return [self.metadata.number(key)] * self.n_listed

    def _refuse(self, present: bool, what: str) -> None:
        if present:
            raise QuantkitError(f"evaluating {self.arch} models with {what} is not supported")

    def refuse_keys(self, *keys: str) -> None:
        """Raise QuantkitError when one of `keys` is there: it asks for what the forward pass does not do."""
        for key in keys:
            value = self.metadata.get(f"{self.arch}.{key}")
            if value is not None and (value.type == ValueType.ARRAY or value.value):
                raise QuantkitError(f"evaluating {self.arch} models with {self.arch}.{key} is not supported")

    # Parts

    def linear(self, stem: str) -> Linear:
        """The matrix `stem`.weight, with `stem`.bias if the model has it."""
        return Linear(f"{stem}.weight", f"{stem}.bias" if f"{stem}.bias" in self.tensors else None)

    def norm(self, stem: str) -> Norm:
        """The norm `stem`, with a bias where it is a LayerNorm that has one."""
        has_bias = self.norm_kind is NormKind.LAYER and f"{stem}.bias" in self.tensors
        bias = f"{stem}.bias" if has_bias else None
        return Norm(f"{stem}.weight", self.eps, self.norm_kind, bias)

    def rope(self, style: RopeStyle, **changes: Any) -> Rope:
        """The rotary embedding of the `rope.*` keys and of the tensors of frequency factors.

        With YaRN the keys `yarn_*` are not read: llama.cpp reads them for a few families alone (deepseek2, grok,
        mistral3).
        """
        key = f"{self.arch}.rope.scaling.type"
        scaling = self.metadata.string(key, "linear")
        if scaling not in _SCALINGS:
            raise self.metadata.wrong(key, f"one of {', '.join(_SCALINGS)}")
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0))
        if scaling == "none" or factor <= 0.0:
            factor = 1.0
        n_ctx_orig = self.integer("rope.scaling.original_context_length", self.integer("context_length", 0))
        magnitude = self.number("rope.scaling.attn_factor", 1.0)
        yarn = None
        if scaling == "yarn":
            if n_ctx_orig < 1:
                raise QuantkitError(
                    f"the metadata lacks {self.arch}.rope.scaling.original_context_length, which YaRN needs"
                )
            yarn = Yarn()
            magnitude *= 1.0 + max(0.0, 0.1 * math.log(factor))
        present = {
            name: f"{name}.weight" if f"{name}.weight" in self.tensors else None
            for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
        }
        fields: dict[str, Any] = {
            "n_dims": self.integer("rope.dimension_count", self.head_k),
            "freq_base": self.number("rope.freq_base", 10000.0),
            "freq_scale": 1.0 / factor,
            "magnitude": magnitude,
            "factors": present["rope_freqs"] or present["rope_factors_short"],
            "long_factors": None if present["rope_freqs"] else present["rope_factors_long"],
            "n_ctx_orig": n_ctx_orig,
            "yarn": yarn,
        }
        return Rope(style=style, **{**fields, **changes})

    @cached_property
    def plain_scale(self) -> float:
        """What scores are multiplied with unless a family says otherwise: one over the root of the head size."""
        return 1.0 / math.sqrt(self.head_k)

    @cached_property
    def scale(self) -> float:
        """`attention.scale`, or the plain scale; for families whose key llama.cpp reads."""
        return self.number("attention.scale", 0.0) or self.plain_scale

    def windows(self, window: int, period: int, own_sizes: bool = False) -> list[int | None]:
        """How many positions each layer sees, None for all.

        `attention.sliding_window_pattern` says which layers slide, one by one or as a period: all layers but the last
        of each period, all of them where it is 0. Heads of another size in these are refused, but with `own_sizes`.
        """
        if not own_sizes:
            self.refuse_keys("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa")
        key = f"{self.arch}.attention.sliding_window_pattern"
        if self.metadata.is_array(key):
            slides = [bool(on) for on in self.metadata.array(key, (ValueType.BOOL, *INTEGERS))]
            if len(slides) != self.n_layer:
                raise self.metadata.wrong(key, f"{self.n_layer} values, one for each layer")
        else:
            period = self.metadata.integer(key, default=period)
            slides = [period <= 0 or i % period < period - 1 for i in range(self.n_layer)]
        if window < 1 and any(slides):
            raise QuantkitError(f"the metadata's {self.arch}.attention.sliding_window is {window}, less than 1")
        return [window if on else None for on in slides]

    def attention(self, i: int, rope: Rope | None, **changes: Any) -> Attention:
        """The attention of layer `i`; one product for queries, keys and values where the model has them so."""
        at = f"blk.{i}."
        if f"{at}attn_qkv.weight" in self.tensors:
            products = {"qkv": self.linear(f"{at}attn_qkv")}
        else:
            products = {part: self.linear(f"{at}attn_{part}") for part in "qkv"}
        fields: dict[str, Any] = {
            "n_head": self.heads[i],
            "n_head_kv": self.heads_kv[i] or self.heads[i],
            "head_k": self.head_k,
            "head_v": self.head_v,
            "scale": self.plain_scale,
            "rope": rope,
            "out": self.linear(f"{at}attn_output"),
            "causal": self.causal,
            **products,
        }
        return Attention(**{**fields, **changes})

    def mamba(self, i: int, normed: bool = False) -> Mamba:
        """The state space of layer `i`, of the first kind; `normed` says that what it selects is, without weights."""
        at = f"blk.{i}."
        n_channels = self.integer("ssm.inner_size", high=MAX_HEAD)

        def norm(part: str) -> Norm | None:
            stem = f"{at}ssm_{part}_norm"
            if f"{stem}.weight" in self.tensors:
                return self.norm(stem)
            return Norm(None, self.eps) if normed else None

        return Mamba(
            n_channels=n_channels,
            n_state=self.integer("ssm.state_size", high=MAX_HEAD),
            n_step=self.integer("ssm.time_step_rank", high=MAX_HEAD),
            project=self.linear(f"{at}ssm_in"),
            convolution=self.convolution(f"{at}ssm_conv1d", n_channels),
            select=self.linear(f"{at}ssm_x"),
            step=self.linear(f"{at}ssm_dt"),
            decay=f"{at}ssm_a",
            skip=f"{at}ssm_d",
            out=self.linear(f"{at}ssm_out"),
            step_norm=norm("dt"),
            b_norm=norm("b"),
            c_norm=norm("c"),
        )

    def mamba2(self, i: int) -> Mamba2:
        """The state space of layer `i`."""
        at = f"blk.{i}."
        n_head, n_groups = self.integer("ssm.time_step_rank", low=1), self.integer("ssm.group_count", 1)
        n_state, width = self.integer("ssm.state_size", high=MAX_HEAD), self.integer("ssm.inner_size")
        if width % n_head:
            raise QuantkitError(f"the metadata says a state space of {width} numbers in {n_head} heads")
        return Mamba2(
            n_head=n_head,
            n_groups=n_groups,
            head=width // n_head,
            n_state=n_state,
            project=self.linear(f"{at}ssm_in"),
            convolution=self.convolution(f"{at}ssm_conv1d", width + 2 * n_groups * n_state),
            dt_bias=f"{at}ssm_dt.bias",
            decay=f"{at}ssm_a",
            skip=f"{at}ssm_d",
            out=self.linear(f"{at}ssm_out"),
            norm=self.norm(f"{at}ssm_norm") if f"{at}ssm_norm.weight" in self.tensors else None,
        )

    def convolution(self, stem: str, n_channels: int) -> Convolution:
        """The convolution `stem` before a recurrence, of `n_channels`."""
        bias = f"{stem}.bias" if f"{stem}.bias" in self.tensors else None
        return Convolution(f"{stem}.weight", self.integer("ssm.conv_kernel", low=1), n_channels, bias, silu=True)

    def share_keys(self, attentions: Sequence[Attention], at: int) -> tuple[list[Attention], int]:
        """`attentions` of all layers, of which the last `attention.shared_kv_layers` use the keys and values of others.

        Each uses those of the last layer before them all that has a window as it has, or none. Rows hold them from
        column `at` on; the number is how many columns they take.
        """
        made, end = list(attentions), at
        first = self.n_layer - self.integer("attention.shared_kv_layers", 0)
        for i in range(max(0, first), self.n_layer):
            sees_all = made[i].window is None
            source = next((j for j in range(first - 1, -1, -1) if (made[j].window is None) == sees_all), None)
            if source is None:
                raise QuantkitError(f"the metadata says that layer {i} uses another's keys, and there is none")
            a = made[source]
            sizes = a.n_head_kv, a.head_k, a.head_v
            if sizes != (made[i].n_head_kv, made[i].head_k, made[i].head_v):
                raise QuantkitError(f"the metadata says that layers {source} and {i} share keys of other sizes")
            if a.kept_at is None:
                made[source] = a = replace(a, kept_at=end)
                end += a.n_head_kv * (a.head_k + a.head_v)
            shared = SharedKeys(source, a.kept_at or 0)
            made[i] = replace(made[i], k=None, v=None, k_norm=None, v_norm=None, shared=shared)
        return made, end - at

    def unused_keys(self, attentions: Sequence[Attention]) -> tuple[str, ...]:
        """The tensors that make keys and values in layers which use others'."""
        parts = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
        names = [f"blk.{i}.{part}" for i, a in enumerate(attentions) if a.shared for part in parts]
        return tuple(name for name in names if name in self.tensors)

    def side_embedding(self) -> SideEmbedding | None:
        """The embedding of tokens for each layer, where the model has one."""
        size = self.integer("embedding_length_per_layer_input", 0)
        if not size:
            return None
        norm = self.norm("per_layer_proj_norm")
        return SideEmbedding(size, "per_layer_token_embd.weight", self.linear("per_layer_model_proj"), norm)

    def side_input(self, i: int, side: SideEmbedding | None, at: int) -> SideInput | None:
        """What layer `i` takes of it; all layers' stand from column `at` on."""
        if side is None:
            return None
        stem = f"blk.{i}."
        parts = self.linear(f"{stem}inp_gate"), self.linear(f"{stem}proj"), self.norm(f"{stem}post_norm")
        return SideInput(at + i * side.size, side.size, *parts)

    def qk_norms(self, i: int) -> dict[str, Norm]:
        """The norms of layer `i`'s queries and keys, as fields of its attention."""
        return {"q_norm": self.norm(f"blk.{i}.attn_q_norm"), "k_norm": self.norm(f"blk.{i}.attn_k_norm")}

    @cached_property
    def feed_forward_sizes(self) -> list[int]:
        """How wide each layer's dense block is."""
        return self.per_layer("feed_forward_length")

    def expert_sizes(self) -> list[int]:
        """How wide each layer's experts are: what the dense block's size comes to for each, where nothing says it."""
        sizes = self.per_layer("expert_feed_forward_length", 0)
        if min(sizes) >= 1:
            return sizes
        used = self.per_layer("expert_used_count", low=1)
        return [n_ff // n_used for n_ff, n_used in zip(self.feed_forward_sizes, used, strict=True)]

    def feed_forward(self, i: int, activation: Activation | XIELU = Activation.SILU, gated: bool = True) -> FeedForward:
        """The dense feed-forward block of layer `i`."""
        return FeedForward(
            n_ff=self.feed_forward_sizes[i],
            activation=activation,
            gate=self.linear(f"blk.{i}.ffn_gate") if gated else None,
            up=self.linear(f"blk.{i}.ffn_up"),
            down=self.linear(f"blk.{i}.ffn_down"),
        )

    def experts(self, i: int, n_ff: int | None = None, **changes: Any) -> Experts:
        """The experts of layer `i`; `n_ff` is their size where it is not the dense blocks'."""
        n_expert, n_used = self.integer("expert_count"), self.per_layer("expert_used_count", low=1)[i]
        if not 0 < n_used <= n_expert:
            raise QuantkitError(f"the metadata says that {n_used} of {n_expert} experts are used")
        at = f"blk.{i}."
        n_groups = max(1, self.integer("expert_group_count", 0))
        fields: dict[str, Any] = {
            "n_ff": n_ff or self.feed_forward_sizes[i],
            "n_expert": n_expert,
            "n_used": n_used,
            "router": self.linear(f"{at}ffn_gate_inp"),
            "gate": f"{at}ffn_gate_exps.weight",
            "up": f"{at}ffn_up_exps.weight",
            "down": f"{at}ffn_down_exps.weight",
            "selection_bias": f"{at}exp_probs_b.bias" if f"{at}exp_probs_b.bias" in self.tensors else None,
            "n_groups": n_groups,
            "n_groups_used": self.integer("expert_group_used_count", 0) if n_groups > 1 else 1,
        }
        return Experts(**{**fields, **changes})

    def gating(self, assumed: Gating | None = None) -> Gating:
        """How the experts' shares are made, `assumed` where the metadata is silent."""
        number = self.integer("expert_gating_func", 0)
        kind = _GATINGS.get(number, assumed if number == 0 else None)
        if kind is None:
            raise QuantkitError(
                f"evaluating {self.arch} models with {self.arch}.expert_gating_func {number} is not supported"
            )
        return kind

    def feed_forward_or_experts(self, i: int, **changes: Any) -> FeedForward | Experts:
        """The dense block of layer `i` where it is one of the first ones, else its experts beside what they share."""
        if i < self.integer("leading_dense_block_count", 0):
            return self.feed_forward(i)
        n_ff = self.expert_sizes()[i]
        shared = self.integer("expert_shared_feed_forward_length", 0)
        shared = shared or n_ff * self.integer("expert_shared_count", 0)
        fields: dict[str, Any] = {
            "normalised": self.flag("expert_weights_norm", False),
            "scale": self.number("expert_weights_scale", 0.0) or 1.0,
            "shared": self.shared_experts(i, shared) if shared else None,
        }
        return self.experts(i, n_ff, **{**fields, **changes})

    def shared_experts(self, i: int, n_ff: int) -> FeedForward:
        """The block that all tokens go through beside the experts of layer `i`, `n_ff` wide."""
        return FeedForward(
            n_ff,
            gate=self.linear(f"blk.{i}.ffn_gate_shexp"),
            up=self.linear(f"blk.{i}.ffn_up_shexp"),
            down=self.linear(f"blk.{i}.ffn_down_shexp"),
        )

    def layer(
        self, i: int, mixers: Mixer | tuple[Mixer, ...], feed_forward: FeedForward | Experts | None, **changes: Any
    ) -> Layer:
        """Layer `i`, with a norm before each part."""
        fields: dict[str, Any] = {
            "attention_norm": self.norm(f"blk.{i}.attn_norm"),
            "feed_forward_norm": self.norm(f"blk.{i}.ffn_norm"),
        }
        return Layer(mixers if isinstance(mixers, tuple) else (mixers,), feed_forward, **{**fields, **changes})

    def post_norms(self, i: int) -> dict[str, Norm]:
        """The norms that run on layer `i`'s branches, as fields of the layer."""
        return {
            "post_attention_norm": self.norm(f"blk.{i}.post_attention_norm"),
            "post_feed_forward_norm": self.norm(f"blk.{i}.post_ffw_norm"),
        }

    def head(self, pooling_type: int = 0, **changes: Any) -> Head | None:
        """The classifier of texts, where the model has one.

        It reads the mean of all tokens where the metadata's, or else `pooling_type`, is 1; otherwise the first token,
        or the last one of a causal model.
        """
        dense, out = (self.linear(s) if f"{s}.weight" in self.tensors else None for s in ("cls", "cls.output"))
        last = out or dense
        if last is None:
            return None
        mean = self.integer("classifier.pooling_type", pooling_type) == 1
        fields: dict[str, Any] = {
            "n_out": self.tensors[last.weight].n_rows,
            "pooling": Pooling.MEAN if mean else Pooling.LAST if self.causal else Pooling.FIRST,
            "dense": dense,
            "norm": self.norm("cls.norm") if dense and "cls.norm.weight" in self.tensors else None,
            "out": out,
        }
        return Head(**{**fields, **changes})

    def _predicts(self, name: str) -> bool:
        """Whether tensor `name` belongs to a multi-token-prediction layer."""
        match = re.match(r"blk\.(\d+)\.", name)
        return match is not None and self.n_layer <= int(match[1]) < self.n_listed

    def spec(self, layers: Iterable[Layer], **changes: Any) -> ForwardSpec:
        """The whole model: the output matrix is the embedding's where the model has none of its own."""
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None:
            raise QuantkitError("the model has no tensor token_embd.weight")
        tokens = "tokenizer.ggml.tokens"
        if self.metadata.is_array(tokens) and len(self.metadata[tokens]) != embedding.n_rows:
            raise self.metadata.wrong(tokens, f"{embedding.n_rows} tokens, as token_embd.weight has")
        fields: dict[str, Any] = {
            "architecture": self.arch,
            "n_vocab": embedding.n_rows,
            "n_embd": self.n_embd,
            "n_ctx_train": self.integer("context_length", 0),
            "embedding": "token_embd.weight",
            "layers": tuple(layers),
            "output_norm": self.norm("output_norm"),
            "output": self.linear("output" if "output.weight" in self.tensors else "token_embd"),
            "idle": tuple(name for name in self.tensors if self._predicts(name)),
        }
        return ForwardSpec(**{**fields, **changes})
