"""Rotary position embedding: what a config says of it, and what a GGUF file says of it.

Two spellings are in use: `rope_scaling` with `rope_theta` beside it, and `rope_parameters`, which holds both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.architectures.config import MAX_INTEGER, Config
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from gguf import GGUFWriter

# What a field of the root of a config is called among the rope parameters.
_FROM_ROOT = {
    "rope_theta": ("global_rope_theta", "rope_global_theta", "rope_theta_global", "rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rope_pct", "rope_percent"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}
_LOCAL_THETA = ("local_rope_theta", "rope_local_theta", "rope_theta_local", "swa_rope_theta", "rope_local_base_freq")
_PER_ATTENTION = ("full_attention", "sliding_attention")
_SCALED = ("llama3", "yarn", "longrope")


class RotaryConfig:
    """The rotary parameters of a model in one spelling.

    `full` are those of ordinary attention layers, `local` those of sliding-window layers where they have their own.
    """

    def __init__(self, config: Config) -> None:
        """Find the rotary parameters of `config`, in whichever spelling it uses."""
        self.config = config
        found = config.table("rope_scaling") or config.table("rope_parameters") or {}
        parameters = {key: value for key, value in found.items() if value is not None}
        if any(name in parameters for name in _PER_ATTENTION):
            self.full = self._table(parameters.get("full_attention", parameters))
            self.local = self._table(parameters.get("sliding_attention", {}))
            for table, names in ((self.full, _FROM_ROOT["rope_theta"]), (self.local, _LOCAL_THETA)):
                if (theta := config.find(*names)) is not None:
                    table.setdefault("rope_theta", theta)
        else:
            self.full, self.local = parameters, {}
            if (theta := config.find(*_LOCAL_THETA)) is not None:
                self.local = {"rope_theta": theta}
            for name, names in _FROM_ROOT.items():
                if name not in parameters and (value := config.find(*names)) is not None:
                    parameters[name] = value
        if "rope_type" not in self.full and "type" in self.full:
            self.full["rope_type"] = self.full["type"]
        if self.type in _SCALED and "original_max_position_embeddings" not in self.full:
            self.full["original_max_position_embeddings"] = config.find("max_position_embeddings")

    def _table(self, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.config.wrong(("rope_parameters",), value, "an object of objects")
        return dict(value)

    @property
    def type(self) -> str | None:
        """The kind of scaling, in small letters: default, linear, yarn, llama3, longrope, dynamic."""
        value = self.full.get("rope_type")
        return None if value is None else str(value).lower()

    def number(self, *names: str, default: float | None = None) -> float | None:
        """The first of `names` among the parameters of ordinary attention, as a number, or `default`."""
        value = next((self.full[name] for name in names if name in self.full), default)
        return None if value is None else self.config.finite(value, names)

    def required(self, name: str) -> float:
        """The number `name`. Raises QuantkitError when there is none."""
        value = self.number(name)
        if value is None:
            raise QuantkitError(f"{self.config.path}: rope scaling {self.type!r} lacks {name}")
        return value

    @property
    def sections(self) -> list[int] | None:
        """How many pairs turn with each of four positions, in models that see images; None for others."""
        values = self.full.get("mrope_section")
        if values is None:
            return None
        if not isinstance(values, list) or not all(type(n) is int and 0 <= n < MAX_INTEGER for n in values):
            raise self.config.wrong(("mrope_section",), values, "a list of whole numbers")
        return [*values, 0, 0, 0, 0][:4]

    def write(self, writer: GGUFWriter) -> None:
        """Add the keys of `{arch}.rope.*` in the reference converter's order."""
        from gguf import RopeScalingType

        factor = self.number("factor")
        if self.type == "linear" and factor is not None:
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(factor)
        elif self.type == "yarn" and factor is not None:
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(factor)
            writer.add_rope_scaling_orig_ctx_len(int(self.required("original_max_position_embeddings")))
            for names, add in (
                (("extrapolation_factor",), writer.add_rope_scaling_yarn_ext_factor),
                (("attention_factor", "attn_factor"), writer.add_rope_scaling_yarn_attn_factor),
                (("beta_fast",), writer.add_rope_scaling_yarn_beta_fast),
                (("beta_slow",), writer.add_rope_scaling_yarn_beta_slow),
            ):
                if (value := self.number(*names)) is not None:
                    add(value)
        elif self.type in ("su", "longrope"):
            writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        elif self.type not in (None, "default", "dynamic", "llama3", "mrope", "proportional"):
            raise QuantkitError(f"{self.config.path}: the rope scaling {self.type!r} is not supported")
        if self.sections is not None:
            writer.add_rope_dimension_sections(self.sections)
        if (theta := self.number("rope_theta")) is not None:
            writer.add_rope_freq_base(theta)
        if (theta := self.local.get("rope_theta")) is not None:
            writer.add_rope_freq_base_swa(self.config.finite(theta, ("rope_theta",)))

    def frequency_factors(self, name: str, dim: int) -> np.ndarray | None:
        """The list `name` of what divides each frequency: float32 of shape (dim / 2,), or None without it."""
        values = self.full.get(name)
        if not values:
            return None
        problem = f"{self.config.path}: {name} must be a list of {dim // 2} numbers"
        if not isinstance(values, list) or len(values) != dim / 2:
            raise QuantkitError(problem)
        return np.array([self.config.finite(value, (name,)) for value in values], np.float32)

    def longrope_factors(self, dim: int) -> dict[str, np.ndarray]:
        """LongRoPE's frequency factors by tensor name, for long texts and for short ones; none without LongRoPE."""
        long, short = self.frequency_factors("long_factor", dim), self.frequency_factors("short_factor", dim)
        if long is None and short is None:
            return {}
        if long is None or short is None:
            present, missing = ("long", "short") if short is None else ("short", "long")
            raise QuantkitError(f"{self.config.path}: rope scaling has a {present}_factor and no {missing}_factor")
        return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}

    def llama3_factors(self, dim: int, factor: float = 8.0) -> np.ndarray | None:
        """What divides each frequency under Llama 3's scaling: float32 of shape (dim / 2,), or None without it.

        `factor` is by how much long wavelengths are stretched where the config does not say it.

        Source: Llama 3.1's rope scaling. Long wavelengths are stretched by `factor`, short ones are kept, and those
        between are blended. Every operation is in float32 and a quotient is a product with the reciprocal, as torch
        computes it, so that the bits are the reference's.
        """
        if self.type != "llama3":
            return None
        f32 = np.float32
        base = self.required("rope_theta") if "rope_theta" in self.full else 10000.0
        exponents = np.arange(0, dim, 2, dtype=f32) / f32(dim)
        # The correctly rounded power: numpy's float32 one differs between machines.
        powers = np.power(np.float64(f32(base)), exponents.astype(np.float64)).astype(f32)
        factor = self._positive("factor", factor)
        low, high = self._positive("low_freq_factor", 1.0), self._positive("high_freq_factor", 4.0)
        context = self._positive("original_max_position_embeddings", 8192)
        one = f32(1)
        wavelengths = (one / (one / powers)) * f32(2 * math.pi)
        with np.errstate(all="ignore"):  # where the two bounds meet nothing is blended
            smooth = ((one / wavelengths) * f32(context) - f32(low)) / f32(high - low)
            blended = one / ((one - smooth) / f32(factor) + smooth)
        kept, stretched = wavelengths < f32(context / high), wavelengths > f32(context / low)
        factors: np.ndarray = np.where(kept, one, np.where(stretched, f32(factor), blended)).astype(f32)
        return factors

    def _positive(self, name: str, default: float) -> float:
        value = self.number(name, default=default)
        if value is None or value <= 0:
            raise QuantkitError(f"{self.config.path}: rope scaling has {name} = {value}, which must be above 0")
        return value
