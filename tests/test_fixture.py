"""The fixture checkpoint keeps what the other tests count on: its size, its layout, its vocabulary, its texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINYLM
from safetensors import safe_open
from tokenizers import Tokenizer

FIXTURES = TINYLM.parent


def read_json(name: str) -> dict[str, Any]:
    return json.loads((TINYLM / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def headers() -> dict[str, tuple[str, list[int], str]]:
    """Tensor name to its shard, shape and dtype, from the shards themselves."""
    found = {}
    for path in sorted(TINYLM.glob("*.safetensors")):
        with safe_open(path, framework="np") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                part = shard.get_slice(name)
                assert name not in found, "a tensor is in two shards"
                found[name] = (path.name, part.get_shape(), part.get_dtype())
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINYLM / "tokenizer.json"))


def test_size() -> None:
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 8_000_000


def test_shards_agree_with_the_index(headers: dict[str, tuple[str, list[int], str]]) -> None:
    index = read_json("model.safetensors.index.json")
    assert {name: shard for name, (shard, _, _) in headers.items()} == index["weight_map"]
    assert len(set(index["weight_map"].values())) >= 2
    assert index["metadata"]["total_size"] == sum(2 * int(np.prod(shape)) for _, shape, _ in headers.values())


def test_layout(headers: dict[str, tuple[str, list[int], str]]) -> None:
    config = read_json("config.json")
    hidden, forward, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    assert keys < query, "grouped keys and values"
    expected = {"model.embed_tokens": [vocab, hidden], "model.norm": [hidden], "lm_head": [vocab, hidden]}
    for layer in range(config["num_hidden_layers"]):
        of_layer = {
            "self_attn.q_proj": [query, hidden],
            "self_attn.k_proj": [keys, hidden],
            "self_attn.v_proj": [keys, hidden],
            "self_attn.o_proj": [hidden, query],
            "mlp.gate_proj": [forward, hidden],
            "mlp.up_proj": [forward, hidden],
            "mlp.down_proj": [hidden, forward],
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
        }
        expected |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    assert {name: shape for name, (_, shape, _) in headers.items()} == {
        f"{name}.weight": shape for name, shape in expected.items()
    }
    assert all(shape[-1] % 256 == 0 for _, shape, _ in headers.values())
    assert {dtype for _, _, dtype in headers.values()} == {"BF16"}


def test_weights_are_finite_and_trained() -> None:
    """Read as raw BF16: no infinity or NaN, and norms that left the ones that they started from."""
    index = read_json("model.safetensors.index.json")["weight_map"]
    for file in set(index.values()):
        data = (TINYLM / file).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            words = np.frombuffer(data, np.uint16, (end - begin) // 2, start + begin)
            values = (words.astype(np.uint32) << 16).view(np.float32)
            assert np.isfinite(values).all(), name
            assert values.std() > 0, name


def test_vocabulary(tokenizer: Tokenizer) -> None:
    config = read_json("config.json")
    settings = read_json("tokenizer_config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id(settings["bos_token"]) == config["bos_token_id"]
    assert tokenizer.token_to_id(settings["eos_token"]) == config["eos_token_id"]
    assert "bos_token" in settings["chat_template"]


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x  # 12345 don't\n\n\n",
        "naïve café — 漢字 ひらがな 🙂🏽",
        " \t\r\n\u00a0\u3000 trailing  ",
        "\x00\x01\x7f\ufffd",
        "",
    ],
)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == read_json("config.json")["bos_token_id"]
    assert ids[1:] == tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["tinylm-test.txt", "tinylm-calib.txt"])
def test_text(tokenizer: Tokenizer, name: str) -> None:
    text = (FIXTURES / name).read_bytes().decode("utf-8")
    assert 60_000 <= len(text) <= 150_000
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(text) / len(ids) > 2.5, "the vocabulary was trained on other text"
    assert len(ids) >= 40 * 512


def test_texts_share_no_paragraph() -> None:
    """Held-out text that the calibration text repeats would flatter an importance matrix."""

    def paragraphs(name: str) -> set[str]:
        text = (FIXTURES / name).read_text("utf-8")
        return {key for part in text.split("\n\n") if len(key := " ".join(part.split())) >= 40}

    held, calibration = paragraphs("tinylm-test.txt"), paragraphs("tinylm-calib.txt")
    assert min(len(held), len(calibration)) > 200
    assert not held & calibration


def test_quantization_costs_something_and_q8_0_does_not(tmp_path: Path) -> None:
    """What the fixture is for. The bounds are loose: they hold its character, not its digits."""
    from quantkit.report.data import NamedText
    from quantkit.report.ladder import Ladder, LadderOptions
    from quantkit.sources.checkpoint import CheckpointSource

    text = NamedText("held out", (FIXTURES / "tinylm-test.txt").read_text(encoding="utf-8"))
    ladder = Ladder(CheckpointSource(TINYLM), tmp_path, LadderOptions(types=["Q8_0", "Q4_0"], texts=[text]))
    ladder.quantize()
    ladder.measure()
    report = ladder.write()
    q8, q4 = (file["measurements"][0] for file in report["files"])
    assert report["texts"][0]["ppl"]["value"] < 25
    assert abs(q8["ratio"]["value"] - 1) < 0.002
    assert q4["ratio"]["value"] > 1.005
    assert 10 * q8["kld"]["value"] < q4["kld"]["value"]
