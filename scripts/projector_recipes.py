"""Tiny multimodal checkpoints for the tests of projectors: their towers, in the shapes and names of published files.

Of the text model there is one tensor alone, which a projector leaves out. See make_checkpoints.py.
"""

from __future__ import annotations

import json
from typing import Any

_IMAGES = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_WIDTH, _WIDE, _TEXT = 64, 128, 96


def _linear(name: str, n_out: int, n_in: int) -> dict[str, str]:
    return {f"{name}.weight": f"{n_out} {n_in}", f"{name}.bias": f"{n_out}"}


def _norm(name: str) -> dict[str, str]:
    return {f"{name}.weight": f"{_WIDTH}", f"{name}.bias": f"{_WIDTH}"}


def _siglip(tower: str, patch: int, positions: int) -> dict[str, str]:
    block = f"{tower}encoder.layers.{{0-1}}."
    return {
        f"{tower}embeddings.patch_embedding.weight": f"{_WIDTH} 3 {patch} {patch}",
        f"{tower}embeddings.patch_embedding.bias": f"{_WIDTH}",
        f"{tower}embeddings.position_embedding.weight": f"{positions} {_WIDTH}",
        **_norm(f"{block}layer_norm1"),
        **_norm(f"{block}layer_norm2"),
        **_linear(f"{block}mlp.fc1", _WIDE, _WIDTH),
        **_linear(f"{block}mlp.fc2", _WIDTH, _WIDE),
        **{
            k: v for part in ("k", "out", "q", "v") for k, v in _linear(f"{block}self_attn.{part}_proj", 64, 64).items()
        },
        **_norm(f"{tower}post_layernorm"),
    }


_SIGLIP = {
    "hidden_size": _WIDTH, "intermediate_size": _WIDE, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
# The reference names the layers of the older mergers as it does blocks, so there must be three of these.
_QWEN_BLOCK = {
    **_linear("visual.blocks.{0-2}.attn.qkv", 192, 64),
    **_linear("visual.blocks.{0-2}.attn.proj", 64, 64),
}
_QWEN_MERGER = {
    **_linear("visual.merger.mlp.0", 256, 256),
    **_linear("visual.merger.mlp.2", _TEXT, 256),
    "visual.patch_embed.proj.weight": "64 3 2 14 14",
}


def _recipe(
    config: dict[str, Any],
    tensors: dict[str, str],
    preprocessor: dict[str, Any],
    embedding: str = "language_model.model.embed_tokens.weight",
    **more: Any,
) -> dict[str, Any]:
    return {
        "config": {"vocab_size": 320, **config},
        "tensors": {embedding: f"320 {_TEXT}", **tensors},
        "files": {"preprocessor_config.json": json.dumps(preprocessor)},
        **more,
    }


_PIXTRAL = {
    **{
        f"vision_tower.transformer.layers.{{0-2}}.{name}": shape
        for name, shape in {
            **{f"attention.{part}_proj.weight": "64 64" for part in "kovq"},
            "attention_norm.weight": "64",
            "feed_forward.down_proj.weight": "64 128",
            "feed_forward.gate_proj.weight": "128 64",
            "feed_forward.up_proj.weight": "128 64",
            "ffn_norm.weight": "64",
        }.items()
    },
    "vision_tower.ln_pre.weight": "64",
    "vision_tower.patch_conv.weight": "64 3 8 8",
}
_PIXTRAL_CONFIG = {**_SIGLIP, "num_hidden_layers": 3, "model_type": "pixtral", "head_dim": 32, "hidden_act": "silu"}
_BREAK = {"added_tokens_decoder": {"12": {"content": "[IMG_BREAK]", "special": True}}}


PROJECTORS: dict[str, dict[str, Any]] = {
    "tiny-eye-gemma3": _recipe(
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 4,
            "text_config": {"model_type": "gemma3_text", "hidden_size": _TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP},
        },
        {
            **_siglip("vision_tower.vision_model.", 8, 16),
            "multi_modal_projector.mm_input_projection_weight": f"{_WIDTH} {_TEXT}",
            "multi_modal_projector.mm_soft_emb_norm.weight": f"{_WIDTH}",
        },
        {**_HALVES, "image_seq_length": 4},
    ),
    "tiny-eye-smolvlm": _recipe(
        {
            "architectures": ["SmolVLMForConditionalGeneration"], "model_type": "smolvlm", "scale_factor": 4,
            "text_config": {"model_type": "llama", "hidden_size": _TEXT},
            "vision_config": {"model_type": "smolvlm_vision", **_SIGLIP},
        },
        {
            **_siglip("model.vision_model.", 8, 16),
            "model.connector.modality_projection.proj.weight": f"{_TEXT} 1024",
        },
        {**_HALVES, "size": {"longest_edge": 128}},
        dtype="F32",
    ),
    "tiny-eye-idefics3": _recipe(
        {
            "architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3",
            "text_config": {"model_type": "llama", "hidden_size": _TEXT},
            "vision_config": {"model_type": "idefics3_vision", **_SIGLIP},
        },
        {
            **_siglip("model.vision_model.", 8, 16),
            "model.connector.modality_projection.proj.weight": f"{_TEXT} 256",
        },
        _HALVES,
        dtype="F16",
    ),
    "tiny-eye-pixtral": _recipe(
        {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
            "text_config": {"model_type": "mistral", "hidden_size": _TEXT}, "vision_config": _PIXTRAL_CONFIG,
        },
        {
            **_PIXTRAL,
            **_linear("multi_modal_projector.linear_1", _TEXT, 64),
            **_linear("multi_modal_projector.linear_2", _TEXT, _TEXT),
        },
        _IMAGES,
        # With published names the reference does not find the embedding of [IMG_BREAK].
        embedding="model.embed_tokens.weight",
        tokenizer_config=_BREAK,
    ),
    "tiny-eye-mistral3": _recipe(
        {
            "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "spatial_merge_size": 2,
            "text_config": {"model_type": "mistral", "hidden_size": _TEXT},
            "vision_config": {**_PIXTRAL_CONFIG, "hidden_act": "gelu"},
        },
        {
            **_PIXTRAL,
            "multi_modal_projector.linear_1.weight": f"{_TEXT} 64",
            "multi_modal_projector.linear_2.weight": f"{_TEXT} {_TEXT}",
            "multi_modal_projector.norm.weight": "64",
            "multi_modal_projector.patch_merger.merging_layer.weight": "64 256",
        },
        _IMAGES,
        # With published names the reference does not find the embedding of [IMG_BREAK].
        embedding="model.embed_tokens.weight",
        tokenizer_config=_BREAK,
    ),
    "tiny-eye-llama4": _recipe(
        {
            "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
            "text_config": {"model_type": "llama4_text", "hidden_size": _TEXT},
            "vision_config": {**_SIGLIP, "model_type": "llama4_vision_model", "num_hidden_layers": 3},
        },
        {
            "multi_modal_projector.linear_1.weight": f"{_TEXT} 128",
            "vision_model.class_embedding": "64",
            **_norm("vision_model.layernorm_pre"),
            **_norm("vision_model.layernorm_post"),
            **_norm("vision_model.model.layers.{0-2}.input_layernorm"),
            **_norm("vision_model.model.layers.{0-2}.post_attention_layernorm"),
            **_linear("vision_model.model.layers.{0-2}.mlp.fc1", _WIDE, _WIDTH),
            **_linear("vision_model.model.layers.{0-2}.mlp.fc2", _WIDTH, _WIDE),
            **{
                k: v
                for part in "kovq"
                for k, v in _linear(f"vision_model.model.layers.{{0-2}}.self_attn.{part}_proj", 64, 64).items()
            },
            "vision_model.patch_embedding.linear.weight": "64 192",
            "vision_model.positional_embedding_vlm": "17 64",
            "vision_model.vision_adapter.mlp.fc1.weight": "128 256",
            "vision_model.vision_adapter.mlp.fc2.weight": "128 128",
        },
        _HALVES,
    ),
    "tiny-eye-internvl": _recipe(
        {
            "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
            "min_dynamic_patch": 1, "max_dynamic_patch": 12,
            "llm_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": _TEXT},
            "vision_config": {
                **_SIGLIP, "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b",
                "num_hidden_layers": 4, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "image_size": [32, 32],
            },
        },
        {
            "vision_model.embeddings.class_embedding": "1 1 64",
            "vision_model.embeddings.patch_embedding.weight": "64 3 8 8",
            "vision_model.embeddings.patch_embedding.bias": "64",
            "vision_model.embeddings.position_embedding": "1 17 64",
            **_linear("vision_model.encoder.layers.{0-3}.attn.qkv", 192, 64),
            **_linear("vision_model.encoder.layers.{0-3}.attn.proj", 64, 64),
            "vision_model.encoder.layers.{0-3}.ls{1-2}": "64",
            **_norm("vision_model.encoder.layers.{0-3}.norm{1-2}"),
            **_linear("vision_model.encoder.layers.{0-3}.mlp.fc1", _WIDE, _WIDTH),
            **_linear("vision_model.encoder.layers.{0-3}.mlp.fc2", _WIDTH, _WIDE),
            "mlp1.0.weight": "256",
            "mlp1.0.bias": "256",
            **_linear("mlp1.1", _TEXT, 256),
            **_linear("mlp1.3", _TEXT, _TEXT),
        },
        _IMAGES,
    ),
    "tiny-eye-qwen2-vl": _recipe(
        {
            "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_size": _TEXT,
            "vision_config": {"depth": 3, "embed_dim": 64, "hidden_size": _TEXT, "num_heads": 2, "mlp_ratio": 2},
        },
        {
            **_QWEN_BLOCK,
            **_linear("visual.blocks.{0-2}.mlp.fc1", _WIDE, _WIDTH),
            **_linear("visual.blocks.{0-2}.mlp.fc2", _WIDTH, _WIDE),
            **_norm("visual.blocks.{0-2}.norm1"),
            **_norm("visual.blocks.{0-2}.norm2"),
            **_norm("visual.merger.ln_q"),
            **_QWEN_MERGER,
        },
        _IMAGES,
    ),
    "tiny-eye-qwen25-vl": _recipe(
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": _TEXT,
            "vision_config": {
                "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": _TEXT,
                "fullatt_block_indexes": [0, 1, 2],
            },
        },
        {
            **_QWEN_BLOCK,
            **{
                k: v
                for part, shape in (("gate", (_WIDE, _WIDTH)), ("up", (_WIDE, _WIDTH)), ("down", (_WIDTH, _WIDE)))
                for k, v in _linear(f"visual.blocks.{{0-2}}.mlp.{part}_proj", *shape).items()
            },
            "visual.blocks.{0-2}.norm1.weight": "64",
            "visual.blocks.{0-2}.norm2.weight": "64",
            "visual.merger.ln_q.weight": "64",
            **_QWEN_MERGER,
        },
        _IMAGES,
    ),
    "tiny-eye-qwen3-vl": _recipe(
        {
            "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
            "text_config": {"model_type": "qwen3_vl_text", "hidden_size": _TEXT, "rms_norm_eps": 1e-5},
            "vision_config": {
                "deepstack_visual_indexes": [1], "depth": 3, "hidden_size": 64, "intermediate_size": 128,
                "num_heads": 2, "num_position_embeddings": 16, "out_hidden_size": _TEXT, "patch_size": 16,
            },
        },
        {
            **{f"model.{name}": shape for name, shape in _QWEN_BLOCK.items()},
            **_linear("model.visual.blocks.{0-2}.mlp.linear_fc1", _WIDE, _WIDTH),
            **_linear("model.visual.blocks.{0-2}.mlp.linear_fc2", _WIDTH, _WIDE),
            **_norm("model.visual.blocks.{0-2}.norm1"),
            **_norm("model.visual.blocks.{0-2}.norm2"),
            **_norm("model.visual.merger.norm"),
            **_linear("model.visual.merger.linear_fc1", 256, 256),
            **_linear("model.visual.merger.linear_fc2", _TEXT, 256),
            "model.visual.deepstack_merger_list.0.norm.weight": "256",
            "model.visual.deepstack_merger_list.0.norm.bias": "256",
            **_linear("model.visual.deepstack_merger_list.0.linear_fc1", 256, 256),
            **_linear("model.visual.deepstack_merger_list.0.linear_fc2", _TEXT, 256),
            "model.visual.patch_embed.proj.weight": "64 3 2 16 16",
            "model.visual.patch_embed.proj.bias": "64",
            "model.visual.pos_embed.weight": "16 64",
        },
        _HALVES,
    ),
    # As its repositories hold it: the class is their own code, around transformers' encoder of Whisper.
    "tiny-ear-ultravox": _recipe(
        {
            "architectures": ["UltravoxModel"], "model_type": "ultravox", "hidden_size": _TEXT, "stack_factor": 8,
            "projector_ln_mid": True, "text_model_id": "example-org/Llama-1B", "audio_model_id": None,
            "audio_config": {
                "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": _WIDTH,
                "encoder_layers": 3, "num_hidden_layers": 3, "decoder_layers": 4, "encoder_attention_heads": 2,
                "encoder_ffn_dim": _WIDE, "num_mel_bins": 128, "max_source_positions": 1500,
            },
        },
        {
            "audio_tower.conv1.weight": "64 128 3",
            "audio_tower.conv1.bias": "64",
            "audio_tower.conv2.weight": "64 64 3",
            "audio_tower.conv2.bias": "64",
            "audio_tower.embed_positions.weight": "1500 64",
            **_norm("audio_tower.layer_norm"),
            **_norm("audio_tower.layers.{0-2}.self_attn_layer_norm"),
            **_norm("audio_tower.layers.{0-2}.final_layer_norm"),
            **_linear("audio_tower.layers.{0-2}.fc1", _WIDE, _WIDTH),
            **_linear("audio_tower.layers.{0-2}.fc2", _WIDTH, _WIDE),
            "audio_tower.layers.{0-2}.self_attn.k_proj.weight": "64 64",
            **{
                k: v
                for part in ("out", "q", "v")
                for k, v in _linear(f"audio_tower.layers.{{0-2}}.self_attn.{part}_proj", 64, 64).items()
            },
            "multi_modal_projector.ln_pre.weight": "512",
            "multi_modal_projector.linear_1.weight": "192 512",
            "multi_modal_projector.ln_mid.weight": "96",
            "multi_modal_projector.linear_2.weight": f"{_TEXT} 96",
        },
        {},
        dtype="F32",
    ),
}  # fmt: skip
