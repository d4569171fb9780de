"""Recipes: which type each tensor of a model becomes, after llama_tensor_get_type in llama.cpp's llama-quant.cpp."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from quantkit.blocks.types import GGMLType as T
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import TensorInfo
from quantkit.pipeline.mixtures import (
    AT_LEAST_Q8_0_IN,
    FALLBACKS,
    LOW_BIT_FILES,
    LOW_BIT_RULES,
    NEEDS_IMATRIX,
    NEVER_QUANTIZED,
    NEVER_QUANTIZED_EXACTLY,
    NEVER_QUANTIZED_IN,
    RULES,
    Category,
    FileType,
    ModelFacts,
    Situation,
    category,
)
from quantkit.pipeline.options import QuantizeOptions


@dataclass(frozen=True)
class Choice:
    """The type that a tensor becomes, and why it is not the file type's default ("" when it is)."""

    type: T
    reason: str


@dataclass
class Recipe:
    """Decides the type of each tensor of one model, in file order, because some rules count the tensors before.

    `decisive` collects the patterns of the options' tensor types that decided a tensor's type.
    """

    file: FileType
    model: ModelFacts
    options: QuantizeOptions = field(default_factory=QuantizeOptions)
    has_imatrix: bool = False
    decisive: set[str] = field(default_factory=set, init=False)

    def choose(self, tensors: Iterable[TensorInfo]) -> list[Choice]:
        """Choose the type of each of `tensors`, given in the order in which they will be written.

        Raises QuantkitError where llama-quantize would refuse: no fallback type, an expert tensor without a layer.
        """
        infos = list(tensors)
        categories = [category(info.name) for info in infos]
        tied = Category.OUTPUT not in categories
        n_values = sum(c.is_value for c in categories)
        seen: Counter[str] = Counter()
        patterns = self.options.patterns
        lines = zip(infos, categories, strict=True)
        return [self._choose(info, kind, tied, n_values, seen, patterns) for info, kind in lines]

    def _choose(
        self,
        info: TensorInfo,
        kind: Category,
        tied: bool,
        n_values: int,
        seen: Counter[str],
        patterns: list[tuple[re.Pattern[str], T]],
    ) -> Choice:
        if not self._may_quantize(info):
            return Choice(info.type, "kept")
        options, default = self.options, self.file.default
        pattern, named = next((each for each in patterns if each[0].search(info.name)), (None, None))
        named_table = info.name == "per_layer_token_embd.weight" and named is not None
        if options.embedding_type is not None and kind is Category.TOKEN_EMBD and not named_table:
            return Choice(options.embedding_type, "token embedding type")
        if options.output_type is not None and kind is Category.OUTPUT:
            return Choice(options.output_type, "output tensor type")
        if not default.is_quantized:
            return Choice(default, "")
        if pattern is not None and named is not None:
            self.decisive.add(pattern.pattern)
            chosen = Choice(named, "tensor type")
        elif options.pure:
            chosen = Choice(default, "")
        else:
            picked = self._mixture(info, kind, tied, n_values, seen)
            chosen = Choice(picked, "" if picked == default else "mixture")
        return _fit(info, chosen)

    def _may_quantize(self, info: TensorInfo) -> bool:
        name = info.name
        # Trailing dimensions of 1 do not count, as in ggml_n_dims.
        if self.file.copies or not any(n > 1 for n in info.shape[1:]) or not name.endswith("weight"):
            return False
        if self.options.leave_output_tensor and name == "output.weight":
            return False
        never = (*NEVER_QUANTIZED, *NEVER_QUANTIZED_IN.get(self.model.architecture, ()))
        return name not in NEVER_QUANTIZED_EXACTLY and not any(part in name for part in never)

    def _mixture(self, info: TensorInfo, kind: Category, tied: bool, n_values: int, seen: Counter[str]) -> T:
        default, name = self.file.default, self.file.name
        if any(part in info.name for part in AT_LEAST_Q8_0_IN.get(self.model.architecture, ())):
            return T.Q8_0
        if kind is Category.OUTPUT or (tied and kind is Category.TOKEN_EMBD):
            return self._output_type(info)
        if name == "MXFP4_MOE":
            is_ffn = kind in (Category.FFN_UP, Category.FFN_GATE, Category.FFN_DOWN)
            # bailingmoe3 has 3-D tensors in its attention too.
            stacked = len(info.shape) > 2 and info.shape[2] > 1 and (is_ffn or self.model.architecture != "bailingmoe3")
            return T.MXFP4 if stacked else T.Q8_0
        low_bit = name in LOW_BIT_FILES
        counter = "value" if kind.is_value else kind.name
        layer, n_layer = seen[counter], n_values if kind.is_value else self.model.n_layer
        if kind is not Category.TOKEN_EMBD:
            seen[counter] += 1
        if kind in (Category.FFN_DOWN, Category.FFN_GATE, Category.FFN_UP) and self.model.n_expert > 1 and not low_bit:
            layer = _layer_of(info.name, n_layer)
        situation = Situation(self.model, layer, n_layer, self.has_imatrix)
        chosen = default
        for files, condition, kind_of_rule in (LOW_BIT_RULES if low_bit else RULES).get(kind, []):
            if (files == "*" or name in files.split()) and condition(situation):
                chosen = kind_of_rule or default
                break
        if kind.is_value and not low_bit:
            if self.model.is_70b and chosen in (T.Q3_K, T.Q4_K):
                chosen = T.Q5_K
            if self.model.n_expert == 8:
                chosen = T.Q8_0
        return chosen

    def _output_type(self, info: TensorInfo) -> T:
        """The type of the output matrix, and of the token embeddings where these are tied to it."""
        default = self.file.default
        if self.options.output_type is not None:
            return self.options.output_type
        odd = info.n_per_row % default.block_size != 0
        if self.file.name == "MXFP4_MOE" or self.model.architecture == "falcon" or odd:
            return T.Q8_0
        if self.file.name in LOW_BIT_FILES or self.file.name == "IQ3_XXS":
            return T.Q5_K
        return default if default == T.Q8_0 else T.Q6_K


def _layer_of(name: str, n_layer: int) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    if match is None or int(match[1]) >= n_layer:
        raise QuantkitError(f"tensor {name!r} of a model with experts has no layer below {n_layer} in its name")
    return int(match[1])


def _fit(info: TensorInfo, chosen: Choice) -> Choice:
    """`chosen`, or its fallback where its blocks do not divide the rows."""
    kind, n = chosen.type, info.n_per_row
    if n % kind.block_size == 0:
        return chosen
    if kind not in FALLBACKS and kind.block_size > 32:
        raise QuantkitError(f"tensor {info.name!r} has rows of {n} weights: {kind.name} needs {kind.block_size}s")
    fallback = FALLBACKS.get(kind, kind)
    if n % fallback.block_size:
        fallback = T.F16
    return Choice(fallback, f"{kind.name} needs rows of {kind.block_size}s")


def needs_imatrix(name: str, kind: T, file: FileType) -> bool:
    """Whether tensor `name` would be unusable as `kind` without importance weights."""
    if category(name) in (Category.TOKEN_EMBD, Category.OUTPUT):
        return False
    return kind in NEEDS_IMATRIX or (kind == T.Q2_K and file.name == "Q2_K_S")
