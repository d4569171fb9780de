"""The tiny checkpoints of the families beside Llama: their configs, as transformers' own classes save them, and shapes.

Part of make_checkpoints.py. Shapes are written in letters: V tokens, E hidden, F feed-forward, Q queries, K keys,
H one head, X experts, P positions, and multiples of them. In the names `#` is a layer and `@` an expert.
"""

from __future__ import annotations

import re
from typing import Any

Config = dict[str, Any]

_IDS = {"bos_token_id": 296, "eos_token_id": 297}
_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 288,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
_COMMON = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "transformers_version": "5.23.0"}


def _config(name: str, model_type: str, **values: Any) -> Config:
    config = {"architectures": [name], "model_type": model_type, **_COMMON, **_IDS, **_SIZES, **values}
    return dict(sorted(config.items()))


def _rope(theta: float, **values: Any) -> Config:
    return {**values, "rope_theta": theta, "rope_type": values.get("rope_type", "default")}


def _without(config: Config, *names: str) -> Config:
    return {key: value for key, value in config.items() if key not in names}


_ATTENTION = {
    "self_attn.q_proj.weight": "Q E",
    "self_attn.k_proj.weight": "K E",
    "self_attn.v_proj.weight": "K E",
    "self_attn.o_proj.weight": "E Q",
}
_BIASES = {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"}
_QK_NORMS = {"self_attn.q_norm.weight": "H", "self_attn.k_norm.weight": "H"}
_MLP = {"mlp.gate_proj.weight": "F E", "mlp.up_proj.weight": "F E", "mlp.down_proj.weight": "E F"}
_PRE_NORMS = {"input_layernorm.weight": "E", "post_attention_layernorm.weight": "E"}
_POST_NORMS = {"post_attention_layernorm.weight": "E", "post_feedforward_layernorm.weight": "E"}


def _decoder(*parts: dict[str, str], tied: bool = False, root: str = "model.", head: str = "lm_head.weight") -> Config:
    shapes = {f"{root}embed_tokens.weight": "V E"}
    for part in parts:
        shapes |= {f"{root}layers.#.{name}": shape for name, shape in part.items()}
    shapes[f"{root}norm.weight"] = "E"
    return shapes if tied else shapes | {head: "V E"}


_LLAMA = _decoder(_ATTENTION, _MLP, _PRE_NORMS)
_VISION = {"vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": "F E", "multi_modal_projector.weight": "E E"}
_GEMMA3 = (_ATTENTION, _QK_NORMS, _MLP, _PRE_NORMS, _POST_NORMS, {"pre_feedforward_layernorm.weight": "E"})
_GPT2 = {
    "transformer.wte.weight": "V E",
    "transformer.wpe.weight": "P E",
    "transformer.h.#.attn.c_attn.weight": "E 3E",
    "transformer.h.#.attn.c_attn.bias": "3E",
    "transformer.h.#.attn.c_proj.weight": "E E",
    "transformer.h.#.attn.c_proj.bias": "E",
    "transformer.h.#.mlp.c_fc.weight": "E 4E",
    "transformer.h.#.mlp.c_fc.bias": "4E",
    "transformer.h.#.mlp.c_proj.weight": "4E E",
    "transformer.h.#.mlp.c_proj.bias": "E",
    **{f"transformer.{name}.{kind}": "E" for name in ("h.#.ln_1", "h.#.ln_2", "ln_f") for kind in ("weight", "bias")},
}
_NEOX = {
    "gpt_neox.embed_in.weight": "V E",
    "gpt_neox.layers.#.attention.query_key_value.weight": "3E E",
    "gpt_neox.layers.#.attention.query_key_value.bias": "3E",
    "gpt_neox.layers.#.attention.dense.weight": "E E",
    "gpt_neox.layers.#.attention.dense.bias": "E",
    "gpt_neox.layers.#.mlp.dense_h_to_4h.weight": "F E",
    "gpt_neox.layers.#.mlp.dense_h_to_4h.bias": "F",
    "gpt_neox.layers.#.mlp.dense_4h_to_h.weight": "E F",
    "gpt_neox.layers.#.mlp.dense_4h_to_h.bias": "E",
    **{
        f"gpt_neox.{name}.{kind}": "E"
        for name in ("layers.#.input_layernorm", "layers.#.post_attention_layernorm", "final_layer_norm")
        for kind in ("weight", "bias")
    },
    "gpt_neox.layers.#.attention.rotary_emb.inv_freq": "H",
    "embed_out.weight": "V E",
}
_PHI3 = _decoder(
    {"self_attn.qkv_proj.weight": "Q+2K E", "self_attn.o_proj.weight": "E Q"},
    {"mlp.gate_up_proj.weight": "2F E", "mlp.down_proj.weight": "E F"},
    _PRE_NORMS,
)
_EXPERTS = {"mlp.gate.weight": "X E"} | {
    f"mlp.experts.@.{name}.weight": shape
    for name, shape in (("gate_proj", "G E"), ("up_proj", "G E"), ("down_proj", "E G"))
}
_MIXTRAL_EXPERTS = {"block_sparse_moe.gate.weight": "X E"} | {
    f"block_sparse_moe.experts.@.{name}.weight": shape for name, shape in (("w1", "F E"), ("w2", "E F"), ("w3", "F E"))
}


_INTERNLM2 = {
    "model.tok_embeddings.weight": "V E",
    "model.layers.#.attention.wqkv.weight": "Q+2K E",
    "model.layers.#.attention.wo.weight": "E Q",
    "model.layers.#.feed_forward.w1.weight": "F E",
    "model.layers.#.feed_forward.w3.weight": "F E",
    "model.layers.#.feed_forward.w2.weight": "E F",
    "model.layers.#.attention_norm.weight": "E",
    "model.layers.#.ffn_norm.weight": "E",
    "model.norm.weight": "E",
    "output.weight": "V E",
}


_BAILING = {
    "model.word_embeddings.weight": "V E",
    "model.layers.#.attention.query_key_value.weight": "Q+2K E",
    "model.layers.#.attention.dense.weight": "E Q",
    **{f"model.layers.#.{name}": shape for name, shape in (_EXPERTS | _PRE_NORMS).items()},
    "model.layers.#.mlp.shared_experts.gate_proj.weight": "G E",
    "model.layers.#.mlp.shared_experts.up_proj.weight": "G E",
    "model.layers.#.mlp.shared_experts.down_proj.weight": "E G",
    "model.norm.weight": "E",
    "lm_head.weight": "V E",
}
_BAILING2 = _BAILING | {
    "model.layers.#.attention.query_layernorm.weight": "H",
    "model.layers.#.attention.key_layernorm.weight": "H",
    "model.layers.#.mlp.gate.expert_bias": "X",
}


def shapes(config: Config, letters: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """The stored tensors of a checkpoint with this (text) config and these shapes in letters."""
    hidden = config.get("hidden_size", config.get("n_embd"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    head = config.get("head_dim") or hidden // heads
    experts = config.get("num_local_experts", config.get("num_experts", 0))
    sizes = {
        "V": config["vocab_size"],
        "E": hidden,
        "F": config.get("intermediate_size"),
        "G": config.get("moe_intermediate_size"),
        "Q": heads * head,
        "K": config.get("num_key_value_heads", heads) * head,
        "H": head,
        "X": experts,
        "P": config.get("n_positions"),
    }

    def size(term: str) -> int:
        parts = re.findall(r"(\d*)([A-Z]?)\b", term)
        return sum(int(times or 1) * sizes.get(letter, 1) for times, letter in parts if times or letter)

    found: dict[str, tuple[int, ...]] = {}
    for name, shape in letters.items():
        for layer in range(config.get("num_hidden_layers", config.get("n_layer"))) if "#" in name else (0,):
            for expert in range(experts) if "@" in name else (0,):
                key = name.replace("#", str(layer)).replace("@", str(expert))
                found[key] = tuple(map(size, shape.split()))
    return found


_LONG = [round(1 + i * i / 37, 6) for i in range(32)]
_SHORT = [round(1 + i / 53, 6) for i in range(32)]
_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA = {
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 64,
    "rms_norm_eps": 1e-06,
    "sliding_window": 32,
    "tie_word_embeddings": True,
}
_GEMMA3_TEXT = {
    **_GEMMA,
    "_sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "layer_types": [_SLIDING] * 5 + [_FULL],
    "num_hidden_layers": 6,
    "rope_parameters": {
        _FULL: _rope(1000000.0, rope_type="linear", factor=8.0),
        _SLIDING: _rope(10000.0),
    },
    "use_bidirectional_attention": False,
}
_SILU = {"hidden_act": "silu", "rms_norm_eps": 1e-06, "tie_word_embeddings": False}
_QWEN = {**_SILU, "sliding_window": None, "use_sliding_window": False, "pad_token_id": None}
_MISTRAL_TEXT = {
    **_without(_COMMON, "transformers_version"),
    **_SIZES,
    **_SILU,
    **_IDS,
    "head_dim": 64,
    "model_type": "mistral",
    "pad_token_id": None,
    "rope_parameters": _rope(1000000.0),
    "sliding_window": None,
}
_WRAPPER = {"transformers_version": "5.23.0", "vision_config": {"hidden_size": 1024, "num_attention_heads": 16}}

# Those that bring their own code, so that transformers has no class for them.
OWN_CODE = (
    "tiny-bailing", "tiny-bailing2", "tiny-internlm2", "tiny-internlm3", "tiny-minicpm", "tiny-minicpm4",
    "tiny-nomic-bert", "tiny-nomic-bert-moe", "tiny-jina-bert", "tiny-rwkv7",
)  # fmt: skip
_SPM_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_MINICPM = {**_without(_SILU, "tie_word_embeddings"), **_SPM_IDS, "scale_emb": 12, "scale_depth": 1.4,
            "dim_model_base": 64}  # fmt: skip

_JINA = {
    "embeddings.LayerNorm.bias": "E",
    "embeddings.LayerNorm.weight": "E",
    "embeddings.token_type_embeddings.weight": "2 E",
    "embeddings.word_embeddings.weight": "V E",
} | {
    f"encoder.layer.#.{name}": shape
    for name, shape in {
        **{f"attention.self.{part}.weight": "E E" for part in ("query", "key", "value")},
        **{f"attention.self.{part}.bias": "E" for part in ("query", "key", "value")},
        "attention.output.LayerNorm.bias": "E",
        "attention.output.LayerNorm.weight": "E",
        "attention.output.dense.bias": "E",
        "attention.output.dense.weight": "E E",
        "mlp.gated_layers.weight": "2F E",
        "mlp.layernorm.bias": "E",
        "mlp.layernorm.weight": "E",
        "mlp.wo.bias": "E",
        "mlp.wo.weight": "E F",
    }.items()
}
_NOMIC_EMBEDDINGS = {
    "embeddings.token_type_embeddings.weight": "2 E",
    "embeddings.word_embeddings.weight": "V E",
    "emb_ln.weight": "E",
    "emb_ln.bias": "E",
}
_NOMIC_LAYER = {
    "attn.Wqkv.weight": "3E E",
    "attn.out_proj.weight": "E E",
    **{f"norm{i}.{part}": "E" for i in (1, 2) for part in ("weight", "bias")},
}
_NOMIC = _NOMIC_EMBEDDINGS | {
    f"encoder.layers.#.{name}": shape
    for name, shape in {
        **_NOMIC_LAYER,
        "mlp.fc11.weight": "512 E",
        "mlp.fc12.weight": "512 E",
        "mlp.fc2.weight": "E 512",
    }.items()
}
_NOMIC_MOE = (
    _NOMIC_EMBEDDINGS
    | {
        f"encoder.layers.#.{name}": shape
        for name, shape in {**_NOMIC_LAYER, "attn.Wqkv.bias": "3E", "attn.out_proj.bias": "E"}.items()
    }
    | {
        "encoder.layers.0.mlp.fc1.weight": "512 E",
        "encoder.layers.0.mlp.fc1.bias": "512",
        "encoder.layers.0.mlp.fc2.weight": "E 512",
        "encoder.layers.0.mlp.fc2.bias": "E",
        "encoder.layers.1.mlp.router.layer.weight": "4 E",
        "encoder.layers.1.mlp.experts.bias": "E",
        "encoder.layers.1.mlp.experts.mlp.w1": "2048 E",
        "encoder.layers.1.mlp.experts.mlp.w2": "2048 E",
    }
)

_RWKV = {
    "model.embeddings.weight": "V E",
    **{f"model.layers.0.pre_norm.{part}": "E" for part in ("weight", "bias")},
    **{f"model.layers.#.{norm}_norm.{part}": "E" for norm in ("attn", "ffn") for part in ("weight", "bias")},
    **{f"model.layers.#.attn.x_{part}": "1 1 E" for part in "rwkvag"},
    **{f"model.layers.#.attn.k_{part}": "E" for part in "ka"},
    "model.layers.#.attn.r_k": "4 64",
    **{f"model.layers.#.attn.{part}_proj.weight": "E E" for part in "rkvo"},
    **{f"model.layers.#.attn.{part}_lora.lora.0.weight": "32 E" for part in "wag"},
    **{f"model.layers.#.attn.{part}_lora.lora.2.weight": "E 32" for part in "wag"},
    **{f"model.layers.#.attn.{part}_lora.lora.2.bias": "E" for part in "wa"},
    "model.layers.1.attn.v_lora.lora.0.weight": "32 E",
    "model.layers.1.attn.v_lora.lora.2.weight": "E 32",
    "model.layers.1.attn.v_lora.lora.2.bias": "E",
    **{f"model.layers.#.attn.g_norm.{part}": "E" for part in ("weight", "bias")},
    "model.layers.#.ffn.x_k": "E",
    "model.layers.#.ffn.key.weight": "F E",
    "model.layers.#.ffn.value.weight": "E F",
    **{f"model.norm.{part}": "E" for part in ("weight", "bias")},
    "lm_head.weight": "V E",
}

# By directory name: config.json, shapes, and what of the recipe differs from its defaults.
FAMILIES: dict[str, tuple[Config, dict[str, str], Config]] = {
    "tiny-rwkv7": (
        {
            "architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "hidden_size": 256, "num_hidden_layers": 2,
            "intermediate_size": 512, "head_dim": 64, "norm_eps": 1e-5, "vocab_size": 320, "bos_token_id": 0,
            "num_heads": None, "eos_token_id": 0, "decay_low_rank_dim": 32, "a_low_rank_dim": 32,
            "v_low_rank_dim": 32, "gate_low_rank_dim": 32, "num_attention_heads": 4,
        },
        _RWKV,
        {"vocabulary": "rwkv"},
    ),
    "tiny-qwen2": (
        _config("Qwen2ForCausalLM", "qwen2", **_QWEN, rope_parameters=_rope(1000000.0), max_window_layers=28),
        _decoder(_ATTENTION, _BIASES, _MLP, _PRE_NORMS),
        {"vocabulary": "gpt2"},
    ),
    "tiny-qwen3": (
        _config(
            "Qwen3ForCausalLM", "qwen3", **{**_QWEN, "tie_word_embeddings": True}, attention_bias=False, head_dim=96,
            rope_parameters=_rope(1000000.0), layer_types=[_FULL, _FULL], intermediate_size=512,
        ),
        _decoder(_ATTENTION, _QK_NORMS, _MLP, _PRE_NORMS, tied=True),
        {"shards": 2},
    ),
    "tiny-qwen3-moe": (
        _config(
            "Qwen3MoeForCausalLM", "qwen3_moe", **_QWEN, attention_bias=False, decoder_sparse_step=1, head_dim=64,
            mlp_only_layers=[], moe_intermediate_size=256, norm_topk_prob=True, num_experts_per_tok=2,
            num_local_experts=4, output_router_logits=False, rope_parameters=_rope(1000000.0),
            router_aux_loss_coef=0.001, intermediate_size=768,
        ),
        _decoder(_ATTENTION, _QK_NORMS, _EXPERTS, _PRE_NORMS),
        {"shards": 2},
    ),
    "tiny-mixtral": (
        _config(
            "MixtralForCausalLM", "mixtral", **_SILU, head_dim=None, num_experts_per_tok=2, num_local_experts=4,
            output_router_logits=False, pad_token_id=None, rope_parameters=_rope(1000000.0), sliding_window=None,
            router_aux_loss_coef=0.001, router_jitter_noise=0.0, bos_token_id=1, eos_token_id=2,
        ),
        _decoder(_ATTENTION, _MIXTRAL_EXPERTS, _PRE_NORMS),
        {"vocabulary": "spm", "dtype": "F16"},
    ),
    "tiny-gemma2": (
        _config(
            "Gemma2ForCausalLM", "gemma2", **_GEMMA, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
            layer_types=[_SLIDING, _FULL], rope_parameters=_rope(10000.0), use_bidirectional_attention=None,
        ),
        _decoder(*_GEMMA3[:1], *_GEMMA3[2:]),
        {"vocabulary": "gemma", "norm_at": 0},
    ),
    "tiny-gemma3": (
        _config("Gemma3ForCausalLM", "gemma3_text", **_GEMMA3_TEXT),
        _decoder(*_GEMMA3, tied=True) | {"model.embed_tokens.weight": "V+64 E"},
        {"vocabulary": "gemma", "norm_at": 0, "dtype": "F16"},
    ),
    "tiny-gemma3-vision": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 300,
            "model_type": "gemma3",
            **_WRAPPER,
            "text_config": _without(_config("", "gemma3_text", **_GEMMA3_TEXT, intermediate_size=256), "architectures"),
        },
        {f"language_model.{name}": shape for name, shape in _decoder(*_GEMMA3, tied=True).items()} | _VISION,
        {"vocabulary": "gemma", "norm_at": 0},
    ),
    "tiny-phi3": (
        _config(
            "Phi3ForCausalLM", "phi3", **_SILU, bos_token_id=1, eos_token_id=2, embd_pdrop=0.0, resid_pdrop=0.0,
            pad_token_id=2, original_max_position_embeddings=512, rope_parameters=_rope(10000.0), sliding_window=256,
        ),
        _PHI3,
        {"vocabulary": "phi3"},
    ),
    "tiny-phi3-long": (
        _config(
            "Phi3ForCausalLM", "phi3", **_SILU, bos_token_id=1, eos_token_id=2, embd_pdrop=0.0, resid_pdrop=0.0,
            pad_token_id=2, original_max_position_embeddings=64, sliding_window=None,
            rope_parameters=_rope(
                10000.0, rope_type="longrope", partial_rotary_factor=1.0, original_max_position_embeddings=64,
                long_factor=_LONG, short_factor=_SHORT,
            ),
        ),
        _PHI3,
        {"vocabulary": "phi3"},
    ),
    "tiny-phi4": (
        _config(
            "Phi3ForCausalLM", "phi3", **_SILU, partial_rotary_factor=0.75, pad_token_id=2, sliding_window=None,
            original_max_position_embeddings=128, rope_theta=10000.0, intermediate_size=512,
            rope_scaling={"type": "longrope", "long_factor": _LONG[:24], "short_factor": _SHORT[:24]},
        ),
        _PHI3,
        {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}, "vocabulary": "gpt2"},
    ),
    "tiny-gpt2": (
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], **_IDS,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2", "n_ctx": 128, "n_embd": 256, "n_head": 4, "n_inner": None,
            "n_layer": 2, "n_positions": 128, "tie_word_embeddings": True, "transformers_version": "5.23.0",
            "vocab_size": 320,
        },
        _GPT2,
        {"dtype": "F32"},
    ),
    "tiny-pythia": (
        {
            "architectures": ["GPTNeoXForCausalLM"], "attention_bias": True, **_IDS, "hidden_act": "gelu",
            "hidden_size": 256, "intermediate_size": 512, "layer_norm_eps": 1e-05, "max_position_embeddings": 512,
            "model_type": "gpt_neox", "num_attention_heads": 4, "num_hidden_layers": 2, "rotary_emb_base": 10000,
            "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 320,
        },
        _NEOX,
        {"dtype": "F16"},
    ),
    "tiny-olmo2": (
        _config(
            "Olmo2ForCausalLM", "olmo2", **_SILU, attention_bias=False, pad_token_id=1, rope_parameters=_rope(500000.0)
        ),
        _decoder(_ATTENTION, {"self_attn.q_norm.weight": "Q", "self_attn.k_norm.weight": "K"}, _MLP, _POST_NORMS),
        {},
    ),
    "tiny-olmo3": (
        _config(
            "Olmo3ForCausalLM", "olmo3", **_SILU, attention_bias=False, pad_token_id=1, sliding_window=32,
            num_hidden_layers=4, layer_types=[_SLIDING] * 3 + [_FULL], intermediate_size=256,
            rope_parameters={
                _FULL: _rope(
                    500000.0, rope_type="yarn", factor=8.0, original_max_position_embeddings=64,
                    attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0,
                ),
                _SLIDING: _rope(500000.0),
            },
        ),
        _decoder(_ATTENTION, {"self_attn.q_norm.weight": "Q", "self_attn.k_norm.weight": "K"}, _MLP, _POST_NORMS),
        {},
    ),
    "tiny-granite": (
        _config(
            "GraniteForCausalLM", "granite", **{**_SILU, "tie_word_embeddings": True}, attention_bias=False,
            attention_multiplier=0.015625, embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0,
            mlp_bias=False, pad_token_id=None, rope_parameters=_rope(10000000.0),
        ),
        _decoder(_ATTENTION, _MLP, _PRE_NORMS, tied=True),
        {},
    ),
    "tiny-smollm3": (
        _config(
            "SmolLM3ForCausalLM", "smollm3", **{**_QWEN, "tie_word_embeddings": True}, attention_bias=False,
            layer_types=[_FULL] * 4, mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0],
            num_hidden_layers=4, rope_parameters=_rope(5000000.0), intermediate_size=256,
        ),
        _decoder(_ATTENTION, _MLP, _PRE_NORMS, tied=True),
        {},
    ),
    "tiny-mistral3": (
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "spatial_merge_size": 2,
            "tie_word_embeddings": True,
            **_WRAPPER,
            "text_config": _MISTRAL_TEXT,
        },
        {f"language_model.{name}": shape for name, shape in _LLAMA.items()} | _VISION,
        {},
    ),
    "tiny-ministral3": (
        _config(
            "Ministral3ForCausalLM", "ministral3", **_SILU, head_dim=64, pad_token_id=11, sliding_window=None,
            rope_parameters=_rope(
                1000000.0, rope_type="yarn", type="yarn", factor=8.0, original_max_position_embeddings=64,
                max_position_embeddings=512, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
                llama_4_scaling_beta=0.1,
            ),
        ),
        _LLAMA,
        {},
    ),
    "tiny-llava": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_seq_length": 576,
            "vocab_size": 999,
            **_WRAPPER,
            "text_config": {**_MISTRAL_TEXT, "intermediate_size": 256},
        },
        {f"language_model.{name}": shape for name, shape in _LLAMA.items()} | _VISION,
        {},
    ),
    "tiny-jina-bert": (
        {
            "architectures": ["JinaBertForMaskedLM"], "model_type": "bert", "attention_probs_dropout_prob": 0.0,
            "emb_pooler": "mean", "feed_forward_type": "geglu", "hidden_act": "gelu", "hidden_size": 256,
            "intermediate_size": 512, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
            "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0, "position_embedding_type": "alibi",
            "type_vocab_size": 2, "vocab_size": 320,
        },
        _JINA,
        {"vocabulary": "wordpiece", "dtype": "F16"},
    ),
    "tiny-nomic-bert": (
        {
            "architectures": ["NomicBertModel"], "model_type": "nomic_bert", "activation_function": "swiglu",
            "bos_token_id": None, "causal": False, "eos_token_id": None, "layer_norm_epsilon": 1e-12,
            "max_trained_positions": 2048, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "n_embd": 256, "n_head": 4,
            "n_inner": 512, "n_layer": 2, "n_positions": 8192, "prenorm": False, "qkv_proj_bias": False,
            "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
            "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "type_vocab_size": 2, "vocab_size": 320,
        },
        _NOMIC,
        {
            "vocabulary": "wordpiece",
            "files": {
                "modules.json": '[{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "1_Pooling"}]',
                "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
            },
        },
    ),
    "tiny-nomic-bert-moe": (
        {
            "architectures": ["NomicBertModel"], "model_type": "nomic_bert", "activation_function": "gelu",
            "bos_token_id": None, "causal": False, "eos_token_id": None, "expert_choice_router": False,
            "layer_norm_epsilon": 1e-5, "max_trained_positions": 2048, "mlp_fc1_bias": True, "mlp_fc2_bias": True,
            "moe_every_n_layers": 2, "moe_impl": "megablocks", "moe_normalize_expert_weights": False, "moe_top_k": 2,
            "n_embd": 256, "n_head": 4, "n_inner": 512, "n_layer": 2, "n_positions": 2048, "num_experts": 4,
            "num_shared_experts": 0, "pad_token_id": 0, "prenorm": False, "qkv_proj_bias": True,
            "rotary_emb_base": 10000, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
            "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "type_vocab_size": 2, "vocab_size": 320,
        },
        _NOMIC_MOE,
        {
            "vocabulary": "wordpiece",
            "files": {
                "modules.json": '[{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "1_Pooling"}]',
                "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
            },
        },
    ),
    "tiny-internlm2": (
        _config(
            "InternLM2ForCausalLM", "internlm2", **{**_SILU, **_SPM_IDS}, bias=False, vocab_size=309,
            rope_theta=1000000.0, rope_scaling={"type": "dynamic", "factor": 2.0},
        ),
        _INTERNLM2,
        {"vocabulary": "internlm2"},
    ),
    "tiny-internlm3": (
        _config(
            "InternLM3ForCausalLM", "internlm3", **_SILU, **_SPM_IDS, qkv_bias=False, head_dim=64,
            rope_theta=50000000.0, rope_scaling={"rope_type": "dynamic", "factor": 6.0},
        ),
        _LLAMA,
        {"vocabulary": "internlm3"},
    ),
    "tiny-minicpm": (
        _config("MiniCPMForCausalLM", "minicpm", **_MINICPM, rope_theta=10000.0),
        _decoder(_ATTENTION, _MLP, _PRE_NORMS, tied=True),
        {"vocabulary": "spm"},
    ),
    "tiny-minicpm4": (
        _config(
            "MiniCPMForCausalLM", "minicpm", **_MINICPM, rope_theta=10000.0,
            rope_scaling={
                "rope_type": "longrope", "long_factor": _LONG, "short_factor": _SHORT,
                "original_max_position_embeddings": 64,
            },
        ),
        _LLAMA,
        {"vocabulary": "spm"},
    ),
    "tiny-bailing": (
        _config(
            "BailingMoeForCausalLM", "bailing_moe", **_SILU, head_dim=None, num_experts=4, num_experts_per_tok=2,
            num_shared_experts=1, moe_intermediate_size=256, first_k_dense_replace=0, norm_topk_prob=True,
            norm_head=False, rope_theta=600000.0,
        ),
        _BAILING,
        {},
    ),
    "tiny-bailing2": (
        _config(
            "BailingMoeV2ForCausalLM", "bailing_moe_v2", **_SILU, head_dim=64, num_experts=8, num_experts_per_tok=2,
            num_shared_experts=1, moe_intermediate_size=256, first_k_dense_replace=0, norm_topk_prob=True,
            n_group=4, topk_group=2, score_function="sigmoid", routed_scaling_factor=2.5, partial_rotary_factor=0.5,
            num_nextn_predict_layers=0, rope_theta=600000.0,
        ),
        _BAILING2,
        {},
    ),
}  # fmt: skip
