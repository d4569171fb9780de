"""Experts in a checkpoint: one by one, which GGUF stacks, or stacked with two projections in one tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Stack:
    """Tensors that a checkpoint keeps one by one, and GGUF stacked: experts, mostly.

    `count` names the config field with their number. `part` is the name of one's tensor, `merged` the name
    that the stack of a projection is looked up under; `{layer}`, `{item}` and `{projection}` are filled in. The
    stacks come in the order of `projections`, where the last part of a layer stands. `items` are what the parts are
    called, where they are not numbered.
    """

    count: tuple[str, ...]
    part: str
    merged: str
    projections: tuple[str, ...]
    items: tuple[str, ...] = ()

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What the names of their tensors match."""
        projections = "|".join(map(re.escape, self.projections))
        pattern = re.escape(self.part).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{item\}", self._item)
        return re.compile(pattern.replace(r"\{projection\}", f"(?:{projections})"))

    @property
    def _item(self) -> str:
        return f"(?:{'|'.join(map(re.escape, self.items))})" if self.items else r"\d+"

    def merged_name(self, layer: str, projection: str = "*") -> str:
        """The name that the stack of a projection is looked up under."""
        return self.merged.format(layer=layer, projection=projection)


# As most families call them.
EXPERTS = Stack(
    count=("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    part="model.layers.{layer}.mlp.experts.{item}.{projection}.weight",
    merged="model.layers.{layer}.mlp.experts.{projection}.weight",
    projections=("down_proj", "gate_proj", "up_proj"),
)
