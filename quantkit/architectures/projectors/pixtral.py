"""Pixtral's projector, of LLaVA checkpoints and of Mistral Small 3.1 and later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.architectures.base import Transform
from quantkit.architectures.config import Config
from quantkit.architectures.projectors.base import Projector
from quantkit.architectures.rearrangements import interleave_rotary
from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

_DEFAULTS = {"vision_config": {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 1024, "patch_size": 16, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
}}  # fmt: skip
_BREAK = "[IMG_BREAK]"
_EMBEDDING = "embed_tokens.weight"
_USUAL_MERGE = 2  # of Mistral3Config


def _row_of_break(config: Config, stored: np.ndarray) -> np.ndarray:
    """The text model's embedding of the token between the rows of an image."""
    row: np.ndarray = stored[config.require("image_break_token")]
    return row


class PixtralProjector(Projector):
    """LlavaForConditionalGeneration's and Mistral3ForConditionalGeneration's, where the tower is Pixtral's.

    llama.cpp wants the text model's embedding of [IMG_BREAK] in the file. The reference converter leaves it out where
    the text model's names begin with `language_model.`, and llama.cpp then refuses the file.
    """

    kind = "pixtral"
    towers = ("pixtral",)
    checkpoints = {  # noqa: RUF012
        "LlavaForConditionalGeneration": _DEFAULTS,
        "Mistral3ForConditionalGeneration": _DEFAULTS,
    }
    beginnings = ("multi_modal_projector.", "vision_tower.", _EMBEDDING)
    transforms = {  # noqa: RUF012
        "q_proj.weight": Transform(interleave_rotary("num_attention_heads")),
        "k_proj.weight": Transform(interleave_rotary("num_attention_heads")),
        _EMBEDDING: Transform(_row_of_break),
    }
    required = (
        "v.patch_embd.weight", "v.pre_ln.weight", "mm.1.weight", "mm.2.weight", "v.token_embd.img_break",
    )  # fmt: skip

    def complete(self, config: Config) -> Config:
        """See Architecture. Raises QuantkitError where the token is not known."""
        return super().complete(config).changed(image_break_token=_token(config.path.parent / "tokenizer_config.json"))

    def canonical_name(self, name: str) -> str | None:
        """See Projector; of the text model it is one tensor that counts."""
        return _EMBEDDING if name.endswith(f".{_EMBEDDING}") else super().canonical_name(name)

    def gguf_tensor_name(self, name: str) -> str:
        """See Architecture."""
        return "v.token_embd.img_break" if name == _EMBEDDING else super().gguf_tensor_name(name)

    def write_kind(self, writer: GGUFWriter) -> None:
        """The epsilon, the activation, and how many patches are merged."""
        super().write_kind(writer)
        writer.add_vision_attention_layernorm_eps(self.config.required_number("layer_norm_eps"))
        self.write_activation(writer)
        merged = self.root.integer("spatial_merge_size")
        if merged is None and self.root.find("model_type") == "mistral3":
            merged = _USUAL_MERGE
        if merged is not None:
            writer.add_vision_spatial_merge_size(merged)


def _token(settings: Path) -> int:
    """The id of [IMG_BREAK], by tokenizer_config.json or the tokenizer.json beside it."""
    found: list[tuple[Any, Any]] = []
    if settings.is_file():
        added = Config(read_json(settings), settings).table("added_tokens_decoder") or {}
        found += [(key, token.get("content")) for key, token in added.items() if isinstance(token, dict)]
    tokenizer = settings.parent / "tokenizer.json"
    if tokenizer.is_file() and isinstance(tokens := read_json(tokenizer).get("added_tokens"), list):
        found += [(token.get("id"), token.get("content")) for token in tokens if isinstance(token, dict)]
    for key, content in found:
        if content == _BREAK and str(key).isdecimal() and len(str(key)) < 10:
            return int(key)
    raise QuantkitError(f"{settings.parent}: its tokenizer has no token {_BREAK}, which the projector needs")
