"""Mixtures: the file types, and the rules by which they give some tensors more bits.

A file type such as Q4_K_M is a mixture: most tensors get its default type, the sensitive ones more bits. The tables
below are those mixtures, one line per rule, after llama_tensor_get_type_impl in llama.cpp's llama-quant.cpp. In
the list of a tensor's category, the first rule that names the file type and whose condition holds gives the type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from quantkit.blocks.types import GGMLType as T
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import INTEGERS, Metadata
from quantkit.wording import did_you_mean


@dataclass(frozen=True)
class FileType:
    """A kind of file that llama-quantize can write: its name, its number in general.file_type, its default type."""

    name: str
    number: int
    default: T
    copies: bool = False


FILE_TYPES: dict[str, FileType] = {
    name: FileType(name, number, default)
    for name, number, default in [
        ("F32", 0, T.F32),
        ("F16", 1, T.F16),
        ("BF16", 32, T.BF16),
        ("Q8_0", 7, T.Q8_0),
        ("Q6_K", 18, T.Q6_K),
        ("Q5_K_M", 17, T.Q5_K),
        ("Q5_K_S", 16, T.Q5_K),
        ("Q5_1", 9, T.Q5_1),
        ("Q5_0", 8, T.Q5_0),
        ("Q4_K_M", 15, T.Q4_K),
        ("Q4_K_S", 14, T.Q4_K),
        ("Q4_1", 3, T.Q4_1),
        ("Q4_0", 2, T.Q4_0),
        ("IQ4_NL", 25, T.IQ4_NL),
        ("IQ4_XS", 30, T.IQ4_XS),
        ("MXFP4_MOE", 38, T.MXFP4),
        ("Q3_K_L", 13, T.Q3_K),
        ("Q3_K_M", 12, T.Q3_K),
        ("Q3_K_S", 11, T.Q3_K),
        ("IQ3_M", 27, T.IQ3_S),
        ("IQ3_S", 26, T.IQ3_S),
        ("IQ3_XS", 22, T.IQ3_S),
        ("IQ3_XXS", 23, T.IQ3_XXS),
        ("Q2_K", 10, T.Q2_K),
        ("Q2_K_S", 21, T.Q2_K),
        ("IQ2_M", 29, T.IQ2_S),
        ("IQ2_S", 28, T.IQ2_XS),
        ("IQ2_XS", 20, T.IQ2_XS),
        ("IQ2_XXS", 19, T.IQ2_XXS),
        ("Q2_0", 41, T.Q2_0),
        ("TQ2_0", 37, T.TQ2_0),
        ("TQ1_0", 36, T.TQ1_0),
        ("IQ1_M", 31, T.IQ1_M),
        ("IQ1_S", 24, T.IQ1_S),
        ("Q1_0", 40, T.Q1_0),
    ]
}
COPY = FileType("COPY", 0, T.F32, copies=True)
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def file_type(name: str) -> FileType:
    """The file type called `name`, in any case, aliases included. Raises QuantkitError that suggests or lists names."""
    upper = name.upper()
    if upper == "COPY":
        return COPY
    try:
        return FILE_TYPES[ALIASES.get(upper, upper)]
    except KeyError:
        known = [*FILE_TYPES, *ALIASES, "COPY"]
        hint = did_you_mean(name, known) or f"known: {', '.join(known)}"
        raise QuantkitError(f"unknown file type {name!r}; {hint}") from None


class Category(Enum):
    """A tensor's role, as far as mixtures distinguish it. The value is a part of its name; the first match counts."""

    ATTENTION_QKV = "attn_qkv.weight"
    ATTENTION_KV_B = "attn_kv_b.weight"
    ATTENTION_V = "attn_v.weight"
    ATTENTION_K = "attn_k.weight"
    ATTENTION_Q = "attn_q.weight"
    ATTENTION_OUTPUT = "attn_output.weight"
    FFN_UP = "ffn_up"
    FFN_GATE = "ffn_gate"
    FFN_DOWN = "ffn_down"
    OUTPUT = "output.weight"
    TOKEN_EMBD = "token_embd.weight"
    OTHER = ""

    @property
    def is_value(self) -> bool:
        """Whether attention values depend on it: the most sensitive of the attention tensors."""
        return self in (Category.ATTENTION_V, Category.ATTENTION_QKV, Category.ATTENTION_KV_B)


def category(name: str) -> Category:
    """The category of the tensor called `name`."""
    if name == "output.weight":
        return Category.OUTPUT
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return Category.TOKEN_EMBD
    inside = (c for c in Category if c not in (Category.OUTPUT, Category.TOKEN_EMBD) and c.value in name)
    return next(inside)


@dataclass(frozen=True)
class ModelFacts:
    """What mixtures need to know of a model."""

    architecture: str
    n_layer: int
    n_gqa: int
    n_expert: int

    @classmethod
    def of(cls, metadata: Metadata) -> ModelFacts:
        """Read them from GGUF metadata. Raises QuantkitError when the block count is missing."""
        arch = metadata.architecture

        def first(key: str, default: int) -> int:
            """A count, or that of the first layer where each has its own."""
            full = f"{arch}.{key}"
            if not metadata.is_array(full):
                return metadata.integer(full, default=default)
            counts = metadata.array(full, INTEGERS)
            if len(counts) and not 0 <= counts[0] <= 0xFFFFFFFF:
                raise metadata.wrong(full, "an array of counts")
            return int(counts[0]) if len(counts) else default

        n_head = first("attention.head_count", 0)
        n_head_kv = first("attention.head_count_kv", n_head)
        # A projector's encoders have layers of their own; llama-quantize counts none.
        n_layer = 0 if arch == "clip" else metadata.integer(f"{arch}.block_count")
        return cls(arch, n_layer, n_head // n_head_kv if n_head_kv else 0, first("expert_count", 0))

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls it a 70B: eight query heads there share each attn_v, so it is worth more bits."""
        if self.architecture == "llama":
            return self.n_layer == 80 and self.n_gqa != 1 and self.n_expert != 8
        return (self.architecture, self.n_layer) in {("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)}


@dataclass(frozen=True)
class Situation:
    """One tensor before its rule: the model, and which of its layers it is (by count, or by name among experts)."""

    model: ModelFacts
    layer: int
    n_layer: int
    has_imatrix: bool

    @property
    def more_bits(self) -> bool:
        """The layers that a _M mixture favours: the first and the last eighth, and every third between."""
        eighth = self.n_layer // 8
        return self.layer < eighth or self.layer >= 7 * self.n_layer // 8 or (self.layer - eighth) % 3 == 2


Condition = Callable[[Situation], bool]


def always(s: Situation) -> bool:
    """No condition."""
    return True


def more_bits(s: Situation) -> bool:
    """See Situation.more_bits."""
    return s.more_bits


def shared_heads(s: Situation) -> bool:
    """Four query heads or more share a key/value head, so attn_v is small."""
    return s.model.n_gqa >= 4


def experts_8(s: Situation) -> bool:
    """A Mixtral-like model: its attention is small beside its experts."""
    return s.model.n_expert == 8


def cheap_values(s: Situation) -> bool:
    """attn_v is small beside the rest: shared heads, or four experts or more."""
    return s.model.n_gqa >= 4 or s.model.n_expert >= 4


def no_imatrix(s: Situation) -> bool:
    """There is no importance matrix."""
    return not s.has_imatrix


def falcon(s: Situation) -> bool:
    """Falcon, tuned apart from the others."""
    return s.model.architecture == "falcon"


def before(numerator: int, denominator: int = 1) -> Condition:
    """The layer is among the first `numerator / denominator` of all (or, alone, among the first `numerator`)."""
    if denominator == 1:
        return lambda s: s.layer < numerator
    return lambda s: s.layer < numerator * s.n_layer // denominator


def middle(s: Situation) -> bool:
    """Neither the first nor the last eighth of the layers."""
    return s.n_layer // 8 <= s.layer < 7 * s.n_layer // 8


def both(*conditions: Condition) -> Condition:
    """All of them."""
    return lambda s: all(c(s) for c in conditions)


def either(*conditions: Condition) -> Condition:
    """One of them."""
    return lambda s: any(c(s) for c in conditions)


def unless(condition: Condition) -> Condition:
    """Its opposite."""
    return lambda s: not condition(s)


Rule = tuple[str, Condition, T | None]  # file types (* for all), condition, type (None: the default)

VALUE_RULES: list[Rule] = [
    ("Q2_K", shared_heads, T.Q4_K),
    ("Q2_K", always, T.Q3_K),
    ("Q2_K_S", shared_heads, T.Q4_K),
    ("IQ3_XXS", shared_heads, T.Q4_K),
    ("IQ3_XXS", no_imatrix, T.IQ3_S),
    ("IQ3_XS IQ3_S", shared_heads, T.Q4_K),
    ("IQ3_M", always, T.Q4_K),
    ("Q3_K_M", before(2), T.Q5_K),
    ("Q3_K_M", always, T.Q4_K),
    ("Q3_K_L", always, T.Q5_K),
    ("IQ4_NL IQ4_XS", shared_heads, T.Q5_K),
    ("Q4_K_M Q5_K_M", more_bits, T.Q6_K),
    ("Q4_K_S", before(4), T.Q5_K),
]

RULES: dict[Category, list[Rule]] = {
    Category.ATTENTION_V: VALUE_RULES,
    Category.ATTENTION_QKV: VALUE_RULES,
    Category.ATTENTION_KV_B: VALUE_RULES,
    Category.ATTENTION_K: [
        ("*", experts_8, T.Q8_0),
        ("IQ3_XS", always, T.IQ3_XXS),
        ("IQ3_XXS", always, T.IQ2_S),
    ],
    Category.ATTENTION_Q: [
        ("IQ3_XS", always, T.IQ3_XXS),
        ("IQ3_XXS", always, T.IQ2_S),
    ],
    Category.ATTENTION_OUTPUT: [
        ("Q3_K_L", falcon, T.Q4_K),
        ("*", falcon, None),
        ("Q2_K IQ3_XS IQ3_XXS Q3_K_S Q3_K_M IQ4_NL Q4_K_S Q4_K_M IQ3_S IQ3_M IQ4_XS", experts_8, T.Q5_K),
        ("*", experts_8, None),
        ("Q2_K", always, T.Q3_K),
        ("IQ3_XXS", always, T.IQ3_S),
        ("Q3_K_M IQ3_M", always, T.Q4_K),
        ("Q3_K_L", always, T.Q5_K),
    ],
    Category.FFN_DOWN: [
        ("Q2_K", always, T.Q3_K),
        ("Q2_K_S", before(1, 8), T.Q4_K),
        ("IQ3_XXS", both(no_imatrix, before(1, 8)), T.Q4_K),
        ("IQ3_XXS", no_imatrix, T.Q3_K),
        ("Q3_K_M", before(1, 16), T.Q5_K),
        ("Q3_K_M", either(unless(falcon), more_bits), T.Q4_K),
        ("IQ3_M", either(before(1, 8), both(experts_8, more_bits)), T.Q4_K),
        ("Q3_K_L", falcon, T.Q4_K),
        ("Q3_K_L", always, T.Q5_K),
        ("Q4_K_M", both(falcon, before(1, 16)), T.Q6_K),
        ("Q4_K_M", both(falcon, more_bits), T.Q5_K),
        ("Q4_K_M", both(unless(falcon), more_bits), T.Q6_K),
        ("IQ4_NL IQ4_XS", both(no_imatrix, before(1, 8)), T.Q5_K),
        ("Q5_K_M", more_bits, T.Q6_K),
        ("Q4_K_S", both(unless(falcon), before(1, 8)), T.Q5_K),
        # With importance weights, Q4_0 and Q5_0 can lose much in the first of these layers.
        ("Q4_0", both(unless(no_imatrix), before(1, 8)), T.Q4_1),
        ("Q5_0", both(unless(no_imatrix), before(1, 8)), T.Q5_1),
    ],
    Category.FFN_GATE: [("IQ3_XS", middle, T.IQ3_XXS)],
    Category.FFN_UP: [("IQ3_XS", middle, T.IQ3_XXS)],
    Category.TOKEN_EMBD: [
        ("IQ2_XXS IQ2_XS IQ1_S IQ1_M", always, T.Q2_K),
        ("IQ2_S IQ2_M IQ3_XXS", always, T.IQ3_S),
        ("TQ1_0 TQ2_0 Q2_0", always, T.Q4_K),
    ],
}

LOW_BIT_FILES = frozenset({"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M"})
LOW_BIT_VALUE_RULES: list[Rule] = [
    ("*", cheap_values, T.Q4_K),
    ("IQ2_S IQ2_M", always, T.IQ3_S),
    ("*", always, T.Q2_K),
]
LOW_BIT_RULES: dict[Category, list[Rule]] = {
    Category.TOKEN_EMBD: RULES[Category.TOKEN_EMBD],
    Category.ATTENTION_V: LOW_BIT_VALUE_RULES,
    Category.ATTENTION_QKV: LOW_BIT_VALUE_RULES,
    Category.ATTENTION_KV_B: LOW_BIT_VALUE_RULES,
    Category.ATTENTION_K: [("*", experts_8, T.Q4_K)],
    Category.FFN_DOWN: [
        ("IQ2_S IQ2_M", before(1, 8), T.IQ3_S),
        ("*", before(1, 8), T.Q2_K),
    ],
    Category.ATTENTION_OUTPUT: [
        ("*", experts_8, T.Q5_K),
        ("IQ1_S IQ1_M", always, T.IQ2_XXS),
        ("IQ2_S IQ2_M", always, T.IQ3_S),
    ],
}

# The type of a tensor whose rows the blocks do not divide; if the fallback's blocks do not either, it becomes F16.
FALLBACKS: dict[T, T] = {
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), T.IQ4_NL),
    **dict.fromkeys((T.Q2_0, T.Q2_K, T.Q3_K, T.TQ1_0, T.TQ2_0), T.Q4_0),
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}

# Names of tensors that stay as they are: norms, routers, positions, and small or delicate parts of other families.
NEVER_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    *(f"time_mix_{part}.weight" for part in ["first", "w0", "w1", "w2", "v0", "v1", "v2"]),
    *(f"time_mix_{part}.weight" for part in ["a0", "a1", "a2", "g1", "g2"]),
    *(f"time_mix_{part}.weight" for part in ["decay_w1", "decay_w2", "lerp_fused"]),
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
# The same for single families, and their tensors that no mixture takes below Q8_0.
NEVER_QUANTIZED_IN: dict[str, tuple[str, ...]] = {
    "glm5-next": (
        *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate"),
        *("indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight"),
        *("ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
    )
}
AT_LEAST_Q8_0_IN: dict[str, tuple[str, ...]] = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}
NEVER_QUANTIZED_EXACTLY = ("position_embd.weight", "token_types.weight")

NEEDS_IMATRIX = frozenset({T.IQ3_XXS, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ1_M, T.IQ1_S})
