"""Phi-3.5-MoE: Phi-3's layers with LayerNorms and biases, separate projections, and experts."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.feed_forward import Gating
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.mixtral import MIXTRAL_EXPERTS
from quantkit.architectures.parameters import EXPERTS, EXPERTS_USED
from quantkit.architectures.phi3 import Phi3
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

_DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "rope_theta": 1000000.0,
}


class PhiMoe(Phi3):
    """PhiMoEForCausalLM, as its checkpoints call it, and PhimoeForCausalLM, as transformers does."""

    gguf_name = "phimoe"
    checkpoints = dict.fromkeys(("PhiMoEForCausalLM", "PhimoeForCausalLM"), _DEFAULTS)
    parameters = (*Phi3.parameters, EXPERTS_USED, EXPERTS)
    stacks = (MIXTRAL_EXPERTS,)
    notes = "experts, LayerNorms, LongRoPE"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """LayerNorms, and experts that the sparse mixer chooses, as transformers runs it.

        llama.cpp takes the norms for RMS norms and the two experts with the largest softmax. LongRoPE's factor for long
        and for short texts is the one that follows from the context, whatever the config says: GGUF has no other.
        """
        model = ModelReader(metadata, tensors, NormKind.LAYER, eps_key="layer_norm_rms_epsilon")
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(i, model.attention(i, rope), model.experts(i, gating=Gating.SPARSE_MIXER, normalised=False))
            for i in range(model.n_layer)
        )
