"""config.json: look-ups by several names, defaults, nested text models, and values that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.architectures import BY_CLASS, FAMILIES, Config, load_architecture
from quantkit.architectures.llama import Llama
from quantkit.errors import QuantkitError

PATH = Path("model/config.json")


def test_the_first_name_that_is_there_counts_even_when_it_is_null() -> None:
    config = Config({"n_inner": None, "hidden_dim": 7}, PATH)
    assert config.integer("intermediate_size", "n_inner", "hidden_dim") is None
    assert config.integer("intermediate_size", "hidden_dim") == 7


def test_what_the_file_says_wins_over_defaults_and_the_text_part_over_both() -> None:
    config = Config({"a": 1, "b": 2}, PATH).with_defaults({"a": 9, "c": 4})
    assert [config.find(key) for key in "abc"] == [1, 2, 4]
    wrapper = Config({"a": 1, "b": 2, "d": 5, "text_config": {"b": 3}}, PATH).with_defaults({"a": 9, "c": 4})
    assert [wrapper.find(key) for key in "abcd"] == [9, 3, 4, 5]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["Wrapper"], "text_config": {"architectures": ["LlamaForCausalLM"]}}, "LlamaForCausalLM"),
        ({"architectures": ["Wrapper"], "text_config": {"hidden_size": 3}}, "Wrapper"),
    ],
)
def test_the_model_class_is_that_of_the_text_part(values: dict[str, Any], name: str) -> None:
    assert Config(values, PATH).model_class == name


@pytest.mark.parametrize("values", [{}, {"architectures": []}, {"architectures": "Llama"}, {"architectures": [3]}])
def test_no_model_class_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(QuantkitError, match="names no model class"):
        assert Config(values, PATH).model_class


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner),
    max_leaves=3,
)


@given(JSON, st.sampled_from(["integer", "number", "table", "require"]))
def test_any_value_is_a_number_or_refused(value: Any, kind: str) -> None:
    try:
        found = getattr(Config({"x": value}, PATH), kind)("x")
    except QuantkitError as error:
        assert str(error).startswith("model/config.json: ") and "\n" not in str(error)
    else:
        assert found is None or isinstance(found, dict) or (math.isfinite(found) and found == value)


def test_silent_fields_are_filled_in_as_the_configuration_class_does() -> None:
    llama = Llama(
        Config({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8, "hidden_size": 512}, PATH)
    ).config
    assert (llama.require("num_key_value_heads"), llama.require("head_dim")) == (8, 64)
    assert (llama.require("max_position_embeddings"), llama.number("rms_norm_eps")) == (2048, 1e-6)
    mistral = Llama(Config({"architectures": ["MistralForCausalLM"], "head_dim": None}, PATH)).config
    assert (mistral.require("num_key_value_heads"), mistral.require("head_dim")) == (8, 128)


def test_what_a_family_covers_is_not_inherited() -> None:
    class Alike(Llama):
        gguf_name = "alike"

    assert Llama.checkpoints and Llama.wrappers
    assert not Alike.checkpoints and not Alike.wrappers


def test_every_family_is_found_by_its_classes_and_others_are_refused(tmp_path: Path) -> None:
    for family in FAMILIES:
        base = family.__base__
        if base is not None and family.checkpoints is base.checkpoints:
            assert "of" in vars(base)  # by hyper-parameters
            continue
        for name in (*family.checkpoints, *family.wrappers):
            assert BY_CLASS[name] is family
            (tmp_path / "config.json").write_text(json.dumps({"architectures": [name], "vocab_size": 8}))
            assert type(load_architecture(tmp_path)) is family
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(QuantkitError, match=r"NoSuchForCausalLM is not supported; .*README\.md shows how"):
        load_architecture(tmp_path)
