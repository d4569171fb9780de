"""Nomic BERT: BERT with rotary embedding, a gate and hardly a bias."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.bert import Bert, encoder_spec
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec, NormKind, RopeStyle
from quantkit.architectures.reader import ModelReader
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo

# How many positions were trained, by how many the model is said to have and to be trained for.
_TRAINED = {(8192, 2048): 2048, (2048, 2048): 512}
# What the forward pass takes for granted.
_FIXED = {
    "activation_function": "swiglu", "causal": False, "qkv_proj_bias": False, "mlp_fc1_bias": False,
    "mlp_fc2_bias": False, "prenorm": False, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}  # fmt: skip


class NomicBert(Bert):
    """NomicBertModel as its authors publish it: nomic-embed-text v1 and v1.5."""

    gguf_name = "nomic-bert"
    checkpoints = {  # noqa: RUF012
        "NomicBertModel": {
            "vocab_size": 30528,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": 3072,
            "n_positions": 8192,
            "type_vocab_size": 2,
            "layer_norm_epsilon": 1e-12,
        }
    }
    vocabulary = "wordpiece-or-xlm-roberta"
    notes = "encoder; rotary embedding, a gate; not the models with experts"

    def complete(self, config: Config) -> Config:
        """See Architecture: the positions that were trained are those that count."""
        if config.find("moe_every_n_layers"):
            raise QuantkitError(f"{config.path}: Nomic BERT with experts (moe_every_n_layers) is not supported")
        for name, value in _FIXED.items():
            if config.find(name) not in (value, None):
                raise config.wrong((name,), config.find(name), f"{value}")
        said = config.require("n_positions"), config.integer("max_trained_positions") or 2048
        if said not in _TRAINED:
            raise config.wrong(("n_positions",), said[0], "8192 or 2048, with 2048 trained positions")
        return super().complete(config).changed(n_positions=_TRAINED[said])

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """BERT's, with rotary embedding in the place of learned positions."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope, layers = model.rope(RopeStyle.NEOX), range(model.n_layer)
        return encoder_spec(model, [model.attention(i, rope) for i in layers], [model.feed_forward(i) for i in layers])
