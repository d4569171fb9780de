"""Rotary parameters in both spellings, and Llama 3's frequencies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantkit.architectures.config import Config
from quantkit.architectures.rotary_config import RotaryConfig
from quantkit.errors import QuantkitError

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope(**values: Any) -> RotaryConfig:
    return RotaryConfig(Config(values, Path("config.json")))


def keys(rope: RotaryConfig) -> dict[str, Any]:
    writer = gguf.GGUFWriter(path=None, arch="x")
    rope.write(writer)
    return {key.removeprefix("x.rope."): value.value for key, value in writer.kv_data[0].items() if ".rope." in key}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1},
        {"rope_type": "llama3", **LLAMA3},
        {},
    ],
)
def test_both_spellings_say_the_same(scaling: dict[str, Any]) -> None:
    new = rope(rope_parameters={**scaling, "rope_theta": 5e5})
    old = rope(rope_scaling=scaling or None, rope_theta=5e5)
    oldest = rope(rope_scaling={"type": scaling.get("rope_type"), **scaling}, rope_theta=5e5)
    assert keys(new) == keys(old) == keys(oldest)
    assert keys(new)["freq_base"] == 5e5
    for factors in (old.llama3_factors(64), oldest.llama3_factors(64)):
        np.testing.assert_array_equal(factors, new.llama3_factors(64))


def test_yarn_writes_what_it_is_given() -> None:
    yarn = {"rope_type": "yarn", "factor": 4, "attention_factor": 1.25, "extrapolation_factor": 0.5}
    assert keys(rope(rope_parameters=yarn, max_position_embeddings=4096)) == {
        "scaling.type": "yarn",
        "scaling.factor": 4,
        "scaling.original_context_length": 4096,
        "scaling.yarn_ext_factor": 0.5,
        "scaling.yarn_attn_factor": 1.25,
    }


def test_sliding_attention_has_a_base_of_its_own() -> None:
    both = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert keys(rope(rope_parameters=both)) == {"freq_base": 1e6, "freq_base_swa": 1e4}
    assert keys(rope(rope_theta=1e6, rope_local_base_freq=1e4)) == {"freq_base": 1e6, "freq_base_swa": 1e4}


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("dim", [64, 128])
def test_llama3_factors_follow_their_definition(base: float, dim: int) -> None:
    """Against the definition in float64; float32 steps cost a few units in the last place."""
    found = rope(rope_parameters={"rope_type": "llama3", "rope_theta": base, **LLAMA3}).llama3_factors(dim)
    assert found is not None and found.dtype == np.float32 and found.shape == (dim // 2,)
    for i, factor in enumerate(found):
        wavelength = 2 * math.pi * base ** (2 * i / dim)
        blend = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        wanted = 1.0 if blend > 1 else 8.0 if blend < 0 else 1 / ((1 - blend) / 8.0 + blend)
        assert factor == pytest.approx(wanted, rel=5e-6)
    assert found[0] == 1 and found[-1] == 8 and ((found > 1) & (found < 8)).any()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"factor": 0}, "factor = 0.0, which must be above 0"),
        ({"low_freq_factor": -1}, "low_freq_factor = -1.0"),
        ({"factor": [8]}, r"factor is '\[8\]', not a finite number"),
        ({"original_max_position_embeddings": True}, "original_max_position_embeddings is 'True'"),
    ],
)
def test_impossible_scaling_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(QuantkitError, match=told):
        rope(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3, **changes}).llama3_factors(64)


def test_yarn_without_its_context_is_refused() -> None:
    with pytest.raises(QuantkitError, match="'yarn' lacks original_max_position_embeddings"):
        keys(rope(rope_parameters={"rope_type": "yarn", "factor": 4}))
