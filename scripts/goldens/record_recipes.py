"""Record how transformers stores a tiny model of each class: its config.json, and its tensors' names, shapes and types.

    python scripts/goldens/record_recipes.py [NAME ...]

Needs torch and transformers. Writes scripts/recipes/NAME.json, of which make_checkpoints.py makes checkpoints without
either. In a tensor's name `{0-3}` stands for the numbers from 0 to 3. Classes that transformers does not have are in
family_recipes.py.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

# What the models share: rows of 256 weights, so that every quantization has whole blocks.
SIZES = {
    "bos_token_id": 296,
    "eos_token_id": 297,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "vocab_size": 320,
}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Model:
    """A class of transformers, what of its config is not `SIZES`, and the other fields of a recipe.

    `called` is what published checkpoints call the class, where that is not the name that transformers gives it, and
    `said` are fields as these say them, where that is not what transformers saves. `renamed` has beginnings of names of
    tensors and what these have instead. `inside` is the field of their config.json that holds what transformers saves.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    called: str | None = None
    said: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    inside: str | None = None


def _rope(theta: float, **values: Any) -> dict[str, Any]:
    return {"rope_type": "default", **values, "rope_theta": theta}


LONG = [round(1 + i * i / 37, 6) for i in range(32)]
SHORT = [round(1 + i / 53, 6) for i in range(32)]
GLM_TOKENS = ["<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>"]
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4, "rope_parameters": _rope(1e7, partial_rotary_factor=0.25),
}  # fmt: skip
STATE_SPACE = {
    "intermediate_size": "absent",
    "num_attention_heads": "absent",
    "num_key_value_heads": "absent",
    "max_position_embeddings": "absent",
}
DENSE_BLOCK = {"gate_proj.weight": "512 256", "up_proj.weight": "512 256", "down_proj.weight": "256 512"}
EXPERT = dict.fromkeys(("gate_proj.weight", "up_proj.weight", "down_proj.weight"), "256 256")
EXPERTS = {f"experts.{i}.{name}": shape for i in range(4) for name, shape in EXPERT.items()}
# Qwen's layer that predicts several tokens, as it is published.
MTP = {
    f"mtp.{name}": shape
    for name, shape in {
        "fc.weight": "256 512",
        "norm.weight": "256",
        "pre_fc_norm_embedding.weight": "256",
        "pre_fc_norm_hidden.weight": "256",
        "layers.0.input_layernorm.weight": "256",
        "layers.0.post_attention_layernorm.weight": "256",
        "layers.0.self_attn.q_proj.weight": "512 256",
        "layers.0.self_attn.k_proj.weight": "128 256",
        "layers.0.self_attn.v_proj.weight": "128 256",
        "layers.0.self_attn.o_proj.weight": "256 256",
        "layers.0.self_attn.q_norm.weight": "64",
        "layers.0.self_attn.k_norm.weight": "64",
    }.items()
}
MTP_MOE = {
    **MTP,
    **{f"mtp.layers.0.mlp.{name}": shape for name, shape in EXPERTS.items()},
    **{f"mtp.layers.0.mlp.shared_expert.{name}": shape for name, shape in EXPERT.items()},
    "mtp.layers.0.mlp.gate.weight": "4 256",
    "mtp.layers.0.mlp.shared_expert_gate.weight": "1 256",
}
QWEN3_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 256,
    "num_position_embeddings": 16,
}  # fmt: skip
EAR = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 256,
    "downsample_hidden_size": 8,
}  # fmt: skip
MROPE = _rope(5e6, mrope_section=[12, 10, 10], mrope_interleaved=True)
ENCODER = {"num_key_value_heads": "absent", "bos_token_id": "absent", "eos_token_id": "absent", "pad_token_id": 0}
T5 = STATE_SPACE | {
    "d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4, "hidden_size": "absent",
    "num_hidden_layers": "absent", "bos_token_id": "absent", "eos_token_id": 2, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
DISTIL_BERT = ENCODER | STATE_SPACE | {
    "dim": 256, "hidden_dim": 512, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 512, "hidden_size": "absent",
    "num_hidden_layers": "absent",
}  # fmt: skip
POOLED = {"modules.json": json.dumps([{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "1_Pooling"}])}
GEMMA = {
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "head_dim": 64, "sliding_window": 32,
    "rope_parameters": {FULL: _rope(1e6), SLIDING: _rope(1e4)}, "final_logit_softcapping": 30.0,
}  # fmt: skip
# Published checkpoints hold the keys of layers that have others' too.
SHARING = {
    f"model.layers.{layer}.self_attn.{name}.weight": shape
    for layer in range(20, 25)
    for name, shape in {"k_proj": "32 64", "v_proj": "32 64", "k_norm": "32"}.items()
}
GEMMA4 = GEMMA | {
    "rope_parameters": {
        FULL: _rope(1e6, rope_type="proportional", partial_rotary_factor=0.25), SLIDING: _rope(1e4)
    },
    "global_head_dim": 128,
}  # fmt: skip
MODELS = {
    "tiny-gemma3n": Model(
        "Gemma3nForCausalLM",
        GEMMA | {
            "num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL], "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.95] * 4, "vocab_size_per_layer_input": 312,
        },
        {"vocabulary": "gemma", "norm_at": 0.4},
    ),
    # As many layers as llama.cpp takes for granted: ten that are sparse, twenty with keys of their own.
    "tiny-gemma3n-deep": Model(
        "Gemma3nForCausalLM",
        GEMMA | {
            "num_hidden_layers": 25, "num_kv_shared_layers": 5, "hidden_size": 64, "intermediate_size": 64,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size_per_layer_input": 320,
        },
        {"vocabulary": "gemma", "norm_at": 0.4, "more": SHARING},
    ),
    "tiny-gemma4": Model(
        "Gemma4ForCausalLM",
        GEMMA4 | {
            "num_hidden_layers": 5, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL], "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 64, "use_double_wide_mlp": True, "vocab_size_per_layer_input": 320,
            "final_logit_softcapping": None,
        },
        {"vocabulary": "gemma4", "norm_at": 0.25},
    ),
    "tiny-gemma4-unified": Model(
        "Gemma4UnifiedForConditionalGeneration",
        {
            "text_config": SIZES | GEMMA4 | {
                "num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL], "attention_k_eq_v": True,
                "num_global_key_value_heads": 1, "moe_intermediate_size": None,  # the reference asks for it
            },
            "vision_config": {
                "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16,
                "output_proj_dims": 32,
            },
            "audio_config": {"audio_embed_dim": 32},
        },
        {
            "vocabulary": "gemma4", "norm_at": 0.25,
            "files": {"generation_config.json": json.dumps({"suppress_tokens": [318, 7]})},
        },
    ),
    "tiny-gemma4-moe": Model(
        "Gemma4ForCausalLM",
        GEMMA4 | {
            "num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL], "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 256, "vocab_size_per_layer_input": 320,
        },
        {"vocabulary": "gemma4", "norm_at": 0.25},
    ),
    "tiny-qwen2-moe": Model(
        "Qwen2MoeForCausalLM",
        {
            "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _rope(1e6),
            "shared_expert_intermediate_size": 512,
        },
        {"added": ["<|endoftext|>"]},
    ),
    "tiny-bert": Model(
        "BertModel",
        ENCODER | {"type_vocab_size": 2},
        {"vocabulary": "wordpiece", "files": POOLED | {"1_Pooling/config.json": '{"pooling_mode_cls_token": true}'}},
    ),
    "tiny-bert-classifier": Model(
        "BertForSequenceClassification",
        ENCODER | {"id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}},
        {"vocabulary": "wordpiece", "dtype": "F32"},
    ),
    "tiny-distilbert": Model(
        DISTIL_BERT,
        {"vocabulary": "wordpiece", "files": POOLED | {"1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}'}},
    ),
    "tiny-distilbert-classifier": Model(
        "DistilBertForSequenceClassification",
        DISTIL_BERT | {"id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}},
        {"vocabulary": "wordpiece", "dtype": "F32"},
    ),
    "tiny-eurobert": Model(
        "EuroBertModel",
        {"pad_token_id": 297, "mask_token_id": 298, "rope_parameters": _rope(250000.0)},
        {"files": POOLED | {"1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}'}},
        said={"classifier_pooling": "mean"},
    ),
    "tiny-t5": Model(
        "T5ForConditionalGeneration",
        T5 | {"num_decoder_layers": 1, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"vocabulary": "t5"},
    ),
    "tiny-t5-encoder": Model("T5EncoderModel", T5, {"vocabulary": "t5", "dtype": "F32"}),
    "tiny-qwen3-reranker": Model("Qwen3ForCausalLM", {"head_dim": 64}, {"added": ["yes", "no"]}),
    "tiny-qwen3-reranker-untied": Model(
        "Qwen3ForCausalLM", {"head_dim": 64, "tie_word_embeddings": False}, {"added": ["yes", "no"], "dtype": "F32"}
    ),
    "tiny-modern-bert": Model(
        "ModernBertModel",
        ENCODER | {
            "num_hidden_layers": 4, "local_attention": 20, "bos_token_id": 296, "cls_token_id": 296,
            "eos_token_id": 297, "sep_token_id": 297, "pad_token_id": 297,
        },
        {"files": POOLED | {"1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}'}},
        said={"layer_norm_eps": 1e-5, "global_attn_every_n_layers": 3},
    ),
    "tiny-roberta": Model(
        "RobertaModel",
        ENCODER | {"pad_token_id": 1, "max_position_embeddings": 258, "type_vocab_size": 1},
        {"files": POOLED | {"1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}'}},
    ),
    "tiny-xlm-roberta": Model(
        "XLMRobertaModel",
        ENCODER | {"pad_token_id": 1, "max_position_embeddings": 258, "type_vocab_size": 1},
        {"vocabulary": "unigram", "files": POOLED | {"1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}'}},
    ),
    "tiny-xlm-roberta-reranker": Model(
        "XLMRobertaForSequenceClassification",
        ENCODER | {
            "pad_token_id": 1, "max_position_embeddings": 258, "type_vocab_size": 1, "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        },
        {"vocabulary": "unigram", "dtype": "F32"},
    ),
    "tiny-modern-bert-classifier": Model(
        "ModernBertForSequenceClassification",
        ENCODER | {
            "num_hidden_layers": 4, "local_attention": 20, "bos_token_id": 296, "cls_token_id": 296,
            "eos_token_id": 297, "sep_token_id": 297, "pad_token_id": 297, "classifier_pooling": "mean",
            "id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2},
        },
        {"dtype": "F32"},
        said={"layer_norm_eps": 1e-5, "global_attn_every_n_layers": 3},
    ),
    "tiny-seed-oss": Model(
        "SeedOssForCausalLM", {"head_dim": 64, "rope_parameters": _rope(1e7), "tie_word_embeddings": False}
    ),
    "tiny-olmoe": Model(
        "OlmoeForCausalLM",
        {
            "intermediate_size": 256,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
            "rope_parameters": _rope(1e4),
        },
    ),
    "tiny-olmo": Model("OlmoForCausalLM", {"clip_qkv": 0.75, "rope_parameters": _rope(1e4)}, {"dtype": "F32"}),
    "tiny-glm4": Model(
        "Glm4ForCausalLM",
        {"head_dim": 64, "attention_bias": True, "rope_parameters": _rope(1e4, partial_rotary_factor=0.5)},
        {"added": GLM_TOKENS},
    ),
    "tiny-gemma": Model(
        "GemmaForCausalLM",
        {"head_dim": 96, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "rope_parameters": _rope(1e4)},
        {"vocabulary": "gemma", "norm_at": 0},
    ),
    "tiny-phi2": Model(
        "PhiForCausalLM",
        {
            "intermediate_size": 1024, "num_key_value_heads": 4, "hidden_act": "gelu_new",
            "rope_parameters": _rope(1e4, partial_rotary_factor=0.5),
        },
        {"dtype": "F16", "vocabulary": "gpt2"},
    ),
    "tiny-phimoe": Model(
        "PhimoeForCausalLM",
        {
            "intermediate_size": 256, "num_local_experts": 4, "bos_token_id": 1, "eos_token_id": 2,
            "attention_bias": True, "lm_head_bias": True, "original_max_position_embeddings": 64,
            "rope_parameters": _rope(
                # transformers' class takes the short factors for texts of any length.
                1e4, rope_type="longrope", original_max_position_embeddings=64, long_factor=SHORT, short_factor=SHORT,
                # What the converter makes of the context.
                long_mscale=math.sqrt(1.5), short_mscale=math.sqrt(1.5),
            ),
        },
        {"vocabulary": "phi3"},
        "PhiMoEForCausalLM",
    ),
    "tiny-command-r": Model(
        "CohereForCausalLM", {"rope_parameters": _rope(1e4), "model_max_length": 1024, "logit_scale": 0.25}
    ),
    "tiny-cohere2": Model(
        "Cohere2ForCausalLM",
        {
            "num_hidden_layers": 4, "intermediate_size": 256, "head_dim": 64, "sliding_window": 32, "rotary_pct": 1.0,
            "rope_parameters": _rope(1e4), "logit_scale": 0.25, "layer_types": [SLIDING] * 3 + [FULL],
        },
    ),
    "tiny-exaone4": Model(
        "Exaone4ForCausalLM",
        {
            "sliding_window": None, "layer_types": [FULL] * 2, "head_dim": 64,
            "rope_parameters": _rope(
                1e6, rope_type="llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=128,
            ),
        },
    ),
    "tiny-exaone4-window": Model(
        "Exaone4ForCausalLM",
        {
            "num_hidden_layers": 4, "intermediate_size": 256, "sliding_window": 32, "sliding_window_pattern": 4,
            "head_dim": 64, "rope_parameters": _rope(1e6),
        },
    ),
    "tiny-granite-moe": Model(
        "GraniteMoeForCausalLM",
        {
            "intermediate_size": 256, "num_local_experts": 4, "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
            "rope_parameters": _rope(1e4),
        },
    ),
    "tiny-granite-moe-shared": Model(
        "GraniteMoeSharedForCausalLM",
        {
            "intermediate_size": 256, "num_local_experts": 4, "shared_intermediate_size": 512,
            "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
            "logits_scaling": 8.0, "rope_parameters": _rope(1e4),
        },
    ),
    "tiny-stablelm": Model(
        "StableLmForCausalLM", {"use_qkv_bias": True, "rope_parameters": _rope(1e4, partial_rotary_factor=0.25)}
    ),
    "tiny-stablelm-2": Model(
        "StableLmForCausalLM",
        {
            "use_parallel_residual": True,
            "rope_parameters": _rope(1e4, partial_rotary_factor=0.25),
        },
    ),
    "tiny-starcoder2": Model(
        "Starcoder2ForCausalLM", {"rope_parameters": _rope(1e5), "sliding_window": None, "tie_word_embeddings": True}
    ),
    "tiny-falcon": Model(
        "FalconForCausalLM",
        {
            "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False,
            "num_kv_heads": 1, "ffn_hidden_size": 1024, "rope_parameters": _rope(1e4),
        },
    ),
    "tiny-falcon-40b": Model(
        "FalconForCausalLM",
        {
            "new_decoder_architecture": True, "bias": False, "num_kv_heads": 2, "ffn_hidden_size": 1024,
            "rope_parameters": _rope(1e4),
        },
    ),
    "tiny-apertus": Model(
        "ApertusForCausalLM",
        {
            "bos_token_id": 296, "eos_token_id": 297,
            "rope_parameters": _rope(
                1e6, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=128,
            ),
        },
    ),
    "tiny-nemotron": Model(
        "NemotronForCausalLM",
        {
            "bos_token_id": 1, "eos_token_id": 2, "head_dim": 64,
            "rope_parameters": _rope(1e4, partial_rotary_factor=0.5),
        },
        {"vocabulary": "spm", "norm_at": 0},
    ),
    "tiny-ernie": Model(
        "Ernie4_5ForCausalLM",
        {"head_dim": 64, "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": _rope(5e5)},
        {"vocabulary": "spm"},
    ),
    "tiny-ernie-moe": Model(
        "Ernie4_5_MoeForCausalLM",
        {
            "intermediate_size": 1024, "moe_intermediate_size": 256, "moe_num_experts": 4, "moe_k": 2,
            "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_num_shared_experts": 2, "bos_token_id": 1,
            "eos_token_id": 2, "rope_parameters": _rope(5e5),
        },
        {"vocabulary": "spm"},
    ),
    "tiny-dots1": Model(
        "Dots1ForCausalLM",
        {
            "moe_intermediate_size": 256, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2,
            "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "head_dim": 64,
            "num_key_value_heads": 4, "rope_parameters": _rope(1e7), "scoring_func": "sigmoid",
        },
        {"added": ["<|endoftext|>"]},
    ),
    "tiny-hunyuan": Model(
        "HunYuanDenseV1ForCausalLM",
        {
            "head_dim": 64, "rope_parameters": _rope(1e4, rope_type="dynamic", factor=1.0, alpha=50.0),
            "max_position_embeddings": 32768, "tie_word_embeddings": True, "eod_token_id": 298,
        },
    ),
    "tiny-hunyuan-moe": Model(
        "HunYuanMoEV1ForCausalLM",
        {
            "head_dim": 64, "num_experts": 4, "moe_topk": [2, 2], "moe_intermediate_size": [512, 512],
            "num_shared_expert": [1, 1], "use_mixed_mlp_moe": True, "rope_parameters": _rope(1e4),
        },
        {"vocabulary": "hunyuan-moe"},
    ),
    "tiny-gpt-oss": Model(
        "GptOssForCausalLM",
        {
            "intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64,
            "sliding_window": 32, "attention_bias": True, "rope_parameters": _rope(
                150000.0, rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=64,
            ),
        },
    ),
    "tiny-gpt-oss-mxfp4": Model(
        "GptOssForCausalLM",
        {
            "intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64,
            "sliding_window": 32, "attention_bias": True, "rope_parameters": _rope(1e4),
        },
        {"mxfp4": True},
    ),
    "tiny-glm4-moe": Model(
        "Glm4MoeForCausalLM",
        {
            "moe_intermediate_size": 256, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 64,
            "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
            "attention_bias": True, "use_qk_norm": True,
            "rope_parameters": _rope(1e6, partial_rotary_factor=0.5),
        },
        {"added": GLM_TOKENS, "more": {
            f"model.layers.2.{name}": shape for name, shape in {
                "eh_proj.weight": "256 512", "enorm.weight": "256", "hnorm.weight": "256",
                "shared_head.norm.weight": "256", "input_layernorm.weight": "256",
                "post_attention_layernorm.weight": "256", "self_attn.q_proj.weight": "256 256",
                "self_attn.k_proj.weight": "128 256", "self_attn.v_proj.weight": "128 256",
                "self_attn.q_proj.bias": "256", "self_attn.k_proj.bias": "128", "self_attn.v_proj.bias": "128",
                "self_attn.o_proj.weight": "256 256", "self_attn.q_norm.weight": "64", "self_attn.k_norm.weight": "64",
                "mlp.gate.weight": "4 256", "mlp.gate.e_score_correction_bias": "F32 4",
                "mlp.experts.{0-3}.gate_proj.weight": "256 256", "mlp.experts.{0-3}.up_proj.weight": "256 256",
                "mlp.experts.{0-3}.down_proj.weight": "256 256", "mlp.shared_experts.gate_proj.weight": "256 256",
                "mlp.shared_experts.up_proj.weight": "256 256", "mlp.shared_experts.down_proj.weight": "256 256",
            }.items()
        }},
    ),
    "tiny-deepseek-v2": Model(
        "DeepseekV2ForCausalLM",
        {
            "num_key_value_heads": 4, "moe_intermediate_size": 256, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": 256, "kv_lora_rank": 256,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "routed_scaling_factor": 1.0,
            "topk_method": "greedy", "norm_topk_prob": False, "scoring_func": "softmax", "n_group": None,
            "topk_group": None,
            "rope_parameters": _rope(
                1e4, rope_type="yarn", factor=40.0, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707,
                original_max_position_embeddings=64,
            ),
        },
    ),
    "tiny-deepseek-v2-lite": Model(
        "DeepseekV2ForCausalLM",
        {
            "num_key_value_heads": 4, "moe_intermediate_size": 256, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 256,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "routed_scaling_factor": 1.0,
            "topk_method": "greedy", "norm_topk_prob": False, "scoring_func": "softmax", "n_group": None,
            "topk_group": None, "rope_parameters": _rope(1e4),
        },
    ),
    "tiny-deepseek-v3": Model(
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4, "moe_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 256, "kv_lora_rank": 256,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "routed_scaling_factor": 2.5,
            "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "scoring_func": "sigmoid",
            "num_nextn_predict_layers": 1, "rope_parameters": _rope(1e4),
        },
        {"more": {
            "model.layers.2.eh_proj.weight": "256 512", "model.layers.2.enorm.weight": "256",
            "model.layers.2.input_layernorm.weight": "256",
        }},
    ),
    "tiny-kimi-k2": Model(
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4, "moe_intermediate_size": 256, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": 256, "kv_lora_rank": 256,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "routed_scaling_factor": 2.827,
            "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "scoring_func": "sigmoid",
            "rope_parameters": _rope(5e4),
        },
        {"vocabulary": "kimi"},
    ),
    "tiny-llama4": Model(
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4, "intermediate_size": 256, "intermediate_size_mlp": 512, "num_local_experts": 2,
            "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "head_dim": 64, "attention_chunk_size": 8192,
            "rope_parameters": _rope(5e5), "use_qk_norm": True, "max_position_embeddings": 512,
        },
    ),
    "tiny-minimax-m2": Model(
        "MiniMaxM2ForCausalLM",
        {
            "head_dim": 64, "intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2,
            "rotary_dim": 32, "rope_parameters": _rope(5e6, partial_rotary_factor=0.5), "scoring_func": "sigmoid",
        },
    ),
    "tiny-lfm2": Model(
        "Lfm2ForCausalLM",
        {
            "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True,
            "intermediate_size": 768, "rope_parameters": _rope(1e6),
        },
    ),
    "tiny-lfm2-moe": Model(
        "Lfm2MoeForCausalLM",
        {
            "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1,
            "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _rope(1e6),
        },
    ),
    "tiny-granite-hybrid": Model(
        "GraniteMoeHybridForCausalLM",
        {
            "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8,
            "mamba_d_head": 64, "mamba_n_groups": 2, "mamba_d_state": 32, "shared_intermediate_size": 256,
            "num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
            "residual_multiplier": 0.22, "attention_multiplier": 0.015625,
        },
        said={"layer_types": ["mamba", "attention", "mamba"]},
    ),
    "tiny-mamba2": Model(
        "Mamba2ForCausalLM",
        {
            **STATE_SPACE, "num_heads": 8, "head_dim": 64, "state_size": 32, "n_groups": 2,
        },
    ),
    "tiny-mamba": Model("MambaForCausalLM", STATE_SPACE),
    "tiny-falcon-mamba": Model("FalconMambaForCausalLM", STATE_SPACE | {"tie_word_embeddings": False}),
    "tiny-falcon-h1": Model(
        "FalconH1ForCausalLM",
        {
            "head_dim": 64, "mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 2,
            "mamba_d_state": 32, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
            "rope_parameters": _rope(1e11), "lm_head_multiplier": 0.6, "embedding_multiplier": 5.7,
            "mlp_multipliers": [0.9, 0.3], "key_multiplier": 0.4, "attention_out_multiplier": 0.9,
            "attention_in_multiplier": 1.1, "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.36],
            "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.2,
        },
    ),
    "tiny-jamba": Model(
        "JambaForCausalLM",
        {
            "num_hidden_layers": 4, "num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1,
            "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_dt_rank": 32, "use_mamba_kernels": False,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        {"vocabulary": "spm"},
    ),
    "tiny-nemotron-h-moe": Model(
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "head_dim": 64,
            "num_hidden_layers": "absent", "ssm_state_size": 32, "mamba_num_heads": 8, "mamba_head_dim": 64,
            "n_groups": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
            "moe_shared_expert_intermediate_size": 512, "routed_scaling_factor": 2.5, "use_mamba_kernels": False,
        },
    ),
    "tiny-nemotron-h": Model(
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"], "head_dim": 64,
            "num_hidden_layers": "absent", "ssm_state_size": 32, "mamba_num_heads": 8, "mamba_head_dim": 64,
            "n_groups": 2, "use_mamba_kernels": False,
        },
        said={"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4, **dict.fromkeys((
            "layers_block_type", "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "n_group",
            "moe_shared_expert_intermediate_size", "moe_latent_size", "moe_shared_expert_overlap", "topk_group",
            "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob", "mtp_layers_block_type",
            "num_nextn_predict_layers",
        ), "absent")},
    ),
    "tiny-granite-micro": Model(
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": ["attention", "attention"], "mamba_n_heads": 8, "mamba_d_head": 64,
            "shared_intermediate_size": 512, "num_local_experts": 0, "num_experts_per_tok": 0,
            "position_embedding_type": "rope", "embedding_multiplier": 12.0, "logits_scaling": 6.0,
            "residual_multiplier": 0.22, "attention_multiplier": 0.015625,
        },
        said={"layer_types": ["attention", "attention"]},
    ),
    "tiny-smolvlm": Model(
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {**SIZES, "model_type": "llama", "rope_parameters": _rope(273768.0)},
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 32, "patch_size": 16,
            },
        },
        called="VLlama3ForCausalLM",
    ),
    "tiny-qwen2-vl": Model(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**SIZES, "rope_parameters": _rope(1e6, mrope_section=[8, 12, 12])},
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 1},
        },
    ),
    "tiny-qwen3-vl": Model(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {
                **SIZES, "head_dim": 64, "rope_parameters": MROPE,
            },
            "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
        },
    ),
    "tiny-qwen3-vl-moe": Model(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {
                **SIZES, "head_dim": 64, "moe_intermediate_size": 512, "num_experts": 4, "num_experts_per_tok": 4,
                "rope_parameters": MROPE,
            },
            "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
        },
        # As it is published; transformers 5 exchanges rows and columns.
        {"more": {
            f"model.language_model.layers.{i}.mlp.experts.{name}": shape
            for i in range(2) for name, shape in {"gate_up_proj": "4 256 1024", "down_proj": "4 512 256"}.items()
        }},
    ),
    "tiny-qwen25-omni": Model(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {
            "text_config": {**SIZES, "rope_parameters": _rope(1e6, mrope_section=[8, 12, 12])},
            "audio_config": EAR, "vision_config": {**QWEN3_VISION, "fullatt_block_indexes": [0]},
        },
        called="Qwen2_5OmniModel",
        inside="thinker_config",
        said={"model_type": "qwen2_5_omni"},
        renamed={"": "thinker."},
    ),
    "tiny-qwen3-omni": Model(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "text_config": {
                **SIZES, "head_dim": 64, "moe_intermediate_size": 512, "num_experts": 4, "num_experts_per_tok": 2,
                "rope_parameters": MROPE,
            },
            "audio_config": EAR, "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
        },
        {
            "added": ["<|im_end|>"],
            "tokenizer_config": {
                "added_tokens_decoder": {"302": {"content": "<|im_end|>", "special": True}},
            },
        },
        called="Qwen3OmniMoeForConditionalGeneration",
        inside="thinker_config",
        said={"model_type": "qwen3_omni_moe"},
        renamed={"": "thinker."},
    ),
    "tiny-qwen3-asr": Model(
        "Qwen3ASRForConditionalGeneration",
        {"text_config": {**SIZES, "head_dim": 64, "rope_parameters": MROPE}, "audio_config": EAR, "pad_token_id": 297},
        {
            "added": ["<|im_end|>"],
            "tokenizer_config": {
                "added_tokens_decoder": {"302": {"content": "<|im_end|>", "special": True}},
            },
        },
        called="Qwen3ASRForConditionalGeneration",
        inside="thinker_config",
        said={"model_type": "qwen3_asr"},
        renamed={
            "model.multi_modal_projector.linear_": "thinker.audio_tower.proj",
            "model.language_model.": "thinker.model.",
            "model.": "thinker.",
            "lm_head.": "thinker.lm_head.",
        },
    ),
    "tiny-qwen3-embedding": Model(
        "Qwen3Model",
        {"head_dim": 64, "rope_parameters": _rope(1e6), "tie_word_embeddings": True},
        {"files": {
            "modules.json": json.dumps([
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            ]),
            "1_Pooling/config.json": json.dumps({"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}),
        }},
        called="Qwen3ForCausalLM",
    ),
    "tiny-qwen3-next": Model(
        "Qwen3NextForCausalLM",
        {
            "num_hidden_layers": 4, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 4,
            "num_experts_per_tok": 2, "shared_expert_intermediate_size": 256, **DELTA,
        },
        {"more": MTP_MOE},
    ),
    "tiny-qwen35": Model(
        "Qwen3_5ForCausalLM",
        {
            "num_hidden_layers": 4, "head_dim": 64, **DELTA, "mtp_num_hidden_layers": 1,
            "rope_parameters": _rope(1e7, partial_rotary_factor=0.25, mrope_section=[3, 3, 2], mrope_interleaved=True),
        },
        {"more": {**MTP, **{f"mtp.layers.0.mlp.{name}": shape for name, shape in DENSE_BLOCK.items()}}},
    ),
    "tiny-qwen35-moe": Model(
        "Qwen3_5MoeForCausalLM",
        {
            "num_hidden_layers": 4, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 4,
            "num_experts_per_tok": 2, "shared_expert_intermediate_size": 256, **DELTA, "intermediate_size": "absent",
            "mtp_num_hidden_layers": 1,
        },
        {"more": MTP_MOE, "added": ["<|endoftext|>"]},
    ),
}  # fmt: skip


# A text model that is there for its width.
_TEXT = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
_HEARS = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2, "num_mel_bins": 128,
}  # fmt: skip
_WHISPER = {
    "d_model": 64, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 128, "num_mel_bins": 128,
}  # fmt: skip
_OMNI = {**_WHISPER, "output_dim": 96}
_QWEN25_EYE = {
    "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 96,
    "fullatt_block_indexes": [0, 1, 2],
}  # fmt: skip
_QWEN3_EYE = {
    "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 96,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [1],
}  # fmt: skip
_GEMMA4_EYE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "patch_size": 4, "position_embedding_size": 64,
}  # fmt: skip
_GEMMA4_TEXT = {**_TEXT, "hidden_size_per_layer_input": 0, "layer_types": ["full_attention"]}
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 48,
}  # fmt: skip
# As they are published; transformers 5 has a level less.
_CLIP_NAMES = {"vision_tower.": "vision_tower.vision_model."}
_IMAGES = {"preprocessor_config.json": json.dumps({"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.25, 0.75]})}
_PLAIN_IMAGES = {"preprocessor_config.json": json.dumps({"image_mean": [0.0] * 3, "image_std": [1.0] * 3})}

PROJECTORS = {
    "tiny-ear-qwen2-audio": Model(
        "Qwen2AudioForConditionalGeneration",
        {"audio_config": _WHISPER, "text_config": {"model_type": "qwen2", **_TEXT}},
    ),
    "tiny-ear-voxtral": Model(
        "VoxtralForConditionalGeneration",
        {"audio_config": _HEARS, "text_config": {"model_type": "llama", **_TEXT}},
        {"dtype": "F16"},
    ),
    "tiny-ear-flamingo": Model(
        "AudioFlamingo3ForConditionalGeneration",
        {"audio_config": _HEARS, "text_config": {"model_type": "qwen2", **_TEXT}},
    ),
    "tiny-ear-qwen3-asr": Model(
        "Qwen3ASRForConditionalGeneration",
        {"audio_config": {**_OMNI, "encoder_layers": 4, "downsample_hidden_size": 32}, "text_config": _TEXT},
        called="Qwen3ASRForConditionalGeneration",
        inside="thinker_config",
        said={"model_type": "qwen3_asr"},
        renamed={
            "model.multi_modal_projector.linear_": "thinker.audio_tower.proj",
            "model.language_model.": "thinker.model.",
            "model.": "thinker.",
        },
    ),
    "tiny-omni-qwen25": Model(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {"audio_config": _OMNI, "text_config": _TEXT, "vision_config": _QWEN25_EYE},
        {"files": _IMAGES},
        called="Qwen2_5OmniModel",
        inside="thinker_config",
        said={"model_type": "qwen2_5_omni"},
        renamed={"": "thinker."},
    ),
    "tiny-omni-qwen3": Model(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "audio_config": {**_OMNI, "downsample_hidden_size": 32}, "vision_config": _QWEN3_EYE,
            "text_config": {**_TEXT, "moe_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1},
        },
        {"files": _IMAGES},
        called="Qwen3OmniMoeForConditionalGeneration",
        inside="thinker_config",
        said={"model_type": "qwen3_omni_moe"},
        # With the published beginning, `thinker.visual.`, the reference fails.
        renamed={"audio_tower.": "thinker.audio_tower.", "model.": "thinker.model."},
    ),
    "tiny-eye-gemma4": Model(
        "Gemma4ForConditionalGeneration",
        {
            "text_config": _GEMMA4_TEXT, "audio_config": None,
            "vision_config": {**_GEMMA4_EYE, "standardize": True, "use_clipped_linears": True},
        },
        {"files": _PLAIN_IMAGES},
    ),
    "tiny-omni-gemma4": Model(
        "Gemma4ForConditionalGeneration",
        {
            "text_config": _GEMMA4_TEXT, "vision_config": _GEMMA4_EYE,
            "audio_config": {
                "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "output_proj_dims": 96,
                "subsampling_conv_channels": [128, 8],
            },
        },
        {"files": _PLAIN_IMAGES},
    ),
}  # fmt: skip
PROJECTORS |= {
    "tiny-eye-lfm2": Model(
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": {"model_type": "lfm2", **_TEXT, "layer_types": [FULL]},
            "vision_config": {
                "model_type": "siglip2_vision_model",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "patch_size": 16,
                "num_patches": 16,
                "vision_use_head": False,
            },
            "vision_feature_layer": -2,
        },
        {"files": _IMAGES},
        renamed={"model.vision_tower.": "model.vision_tower.vision_model."},
    ),
    "tiny-eye-qwen35": Model(
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "layer_types": [FULL]},
            "vision_config": {name: value for name, value in _QWEN3_EYE.items() if name != "deepstack_visual_indexes"},
        },
        {"files": _IMAGES},
    ),
    "tiny-omni-gemma4-unified": Model(
        "Gemma4UnifiedForConditionalGeneration",
        {
            "text_config": {**_TEXT, "layer_types": ["full_attention"]},
            "vision_config": {
                "patch_size": 4,
                "pooling_kernel_size": 3,
                "mm_embed_dim": 64,
                "mm_posemb_size": 64,
                "output_proj_dims": 64,
            },
            "audio_config": {"audio_embed_dim": 640},
        },
        {"files": _PLAIN_IMAGES},
    ),
}
# Those that only older scripts of llama.cpp convert (record_llava.py).
LLAVA = {
    "tiny-eye-llava15": Model(
        "LlavaForConditionalGeneration",
        {"vision_config": _CLIP, "text_config": {"model_type": "llama", **_TEXT}},
        {"dtype": "F16", "files": _IMAGES},
        renamed=_CLIP_NAMES,
    ),
    "tiny-eye-llava16": Model(
        "LlavaNextForConditionalGeneration",
        {
            "vision_config": {**_CLIP, "hidden_act": "gelu"}, "text_config": {"model_type": "llama", **_TEXT},
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]], "vision_feature_layer": -1,
        },
        {"files": _IMAGES},
        renamed=_CLIP_NAMES,
    ),
}  # fmt: skip


def _brace(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    if numbers == list(range(first, last + 1)):
        return f"{{{first}-{last}}}" if last > first else str(first)
    return "{" + ",".join(map(str, numbers)) + "}"


def fold(tensors: dict[str, str]) -> dict[str, str]:
    """Names that differ in one number and say the same as one name, for each place of a number from the last on."""
    for place in (1, 0):
        groups: dict[tuple[str, ...], list[int]] = {}
        for name, said in tensors.items():
            parts = re.split(r"(?<=\.)(\d+)(?=\.)", name)
            at = 2 * place + 1
            if at < len(parts):
                key = ("".join(parts[:at]), "".join(parts[at + 1 :]), said)
                groups.setdefault(key, []).append(int(parts[at]))
            else:
                groups[name, "", said] = []
        tensors = {
            before + (_brace(sorted(numbers)) if numbers else "") + after: said
            for (before, after, said), numbers in groups.items()
        }
    return tensors


def record(model: Model, sizes: dict[str, Any]) -> dict[str, Any]:
    """Make the model, save it as transformers saves it, and read what it wrote."""
    import torch
    import transformers

    cls = getattr(transformers, model.name)
    values = {name: value for name, value in {**sizes, **model.config}.items() if value != "absent"}
    config = cls.config_class(**values)
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(model.recipe.get("dtype", ""), torch.bfloat16)
    with tempfile.TemporaryDirectory() as name:
        cls._from_config(config, dtype=dtype).save_pretrained(name)
        saved = json.loads((Path(name) / "config.json").read_text())
        tensors: dict[str, str] = {}
        for path in sorted(Path(name).glob("*.safetensors")):
            raw = path.read_bytes()
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    kind = entry["dtype"]
                    plain = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
                    tensors[tensor] = " ".join([kind] * (kind != plain) + [str(n) for n in entry["shape"]])
    if model.inside:
        saved = {"architectures": [model.called], model.inside: saved}
    saved = {name: value for name, value in (saved | model.said).items() if value != "absent"}
    for before, after in model.renamed.items():
        tensors = {after + n.removeprefix(before) if n.startswith(before) else n: said for n, said in tensors.items()}
    if model.called:
        saved["architectures"] = [model.called]
    recipe = dict(model.recipe)
    if recipe.pop("mxfp4", False):
        saved["quantization_config"] = {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"}
        for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
            experts, n_in, n_out = tensors.pop(name).split()
            tensors[f"{name}_blocks"] = f"U8 {experts} {n_out} {int(n_in) // 32} 16"
            tensors[f"{name}_scales"] = f"U8 {experts} {n_out} {int(n_in) // 32}"
    # What published checkpoints hold beside what the class knows.
    tensors |= recipe.pop("more", {})
    return {"config": saved, **recipe, "tensors": fold(dict(sorted(tensors.items())))}


def main() -> None:
    """Record the models named, or all."""
    for name in sys.argv[1:] or MODELS | PROJECTORS | LLAVA:
        directory = RECIPES / ("projectors" if name in PROJECTORS else "llava" if name in LLAVA else ".")
        sizes = SIZES if name in MODELS else {}
        directory.mkdir(exist_ok=True)
        text = json.dumps(record((MODELS | PROJECTORS | LLAVA)[name], sizes), indent=1, ensure_ascii=False)
        # Lists of numbers and short texts on one line.
        text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s*\n\s*", " ", m[1]) + "]", text)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main()
