"""The projectors that quantkit converts, one file for each kind: what lets a text model of GGUF see, or hear."""

from __future__ import annotations

from pathlib import Path

from quantkit.architectures.config import Config
from quantkit.architectures.projectors.base import Projector
from quantkit.architectures.projectors.gemma3 import Gemma3Projector
from quantkit.architectures.projectors.gemma4 import Gemma4Projector, Gemma4UnifiedProjector
from quantkit.architectures.projectors.internvl import InternVlProjector
from quantkit.architectures.projectors.lfm2_vl import Lfm2VlProjector
from quantkit.architectures.projectors.llama4 import Llama4Projector
from quantkit.architectures.projectors.llava import LlavaProjector
from quantkit.architectures.projectors.pixtral import PixtralProjector
from quantkit.architectures.projectors.qwen2_vl import Qwen2VlProjector, Qwen25VlProjector
from quantkit.architectures.projectors.qwen3_vl import Qwen3VlProjector
from quantkit.architectures.projectors.qwen_omni import Qwen3AsrProjector, Qwen3OmniProjector, Qwen25OmniProjector
from quantkit.architectures.projectors.smolvlm import SmolVlmProjector
from quantkit.architectures.projectors.whisper import (
    AudioFlamingo3Projector,
    Qwen2AudioProjector,
    UltravoxProjector,
    VoxtralProjector,
)
from quantkit.errors import QuantkitError

PROJECTORS: tuple[type[Projector], ...] = (
    Gemma3Projector,
    Qwen2VlProjector,
    Qwen25VlProjector,
    Qwen3VlProjector,
    SmolVlmProjector,
    PixtralProjector,
    LlavaProjector,
    Llama4Projector,
    InternVlProjector,
    Lfm2VlProjector,
    Gemma4Projector,
    Gemma4UnifiedProjector,
    Qwen2AudioProjector,
    UltravoxProjector,
    VoxtralProjector,
    AudioFlamingo3Projector,
    Qwen25OmniProjector,
    Qwen3OmniProjector,
    Qwen3AsrProjector,
)

_BY_CLASS = {
    name: [projector for projector in PROJECTORS if name in projector.checkpoints]
    for projector in PROJECTORS
    for name in projector.checkpoints
}


def classes() -> list[str]:
    """The transformers classes whose projectors can be converted, by name."""
    return sorted(_BY_CLASS)


def load_projector(directory: Path) -> Projector:
    """The projector of the checkpoint in `directory`, from its config.json.

    Raises QuantkitError for a model class, or a tower, whose projector is not known.
    """
    config = Config.load(directory)
    name = next((name for name in (config.model_class, _wrapper(config)) if name in _BY_CLASS), None)
    if name is None:
        raise QuantkitError(
            f"{config.path}: the projector of {config.model_class[:80]} is not supported, only those of "
            + ", ".join(_BY_CLASS)
        )
    return _of_tower(config, name)(config, name)


def _of_tower(config: Config, name: str) -> type[Projector]:
    """The projector of the class `name` that is for the tower that the config has."""
    section = next(iter(_BY_CLASS[name][0].checkpoints[name]))
    kind = (config.table(section) or {}).get("model_type")
    known: list[str] = []
    for projector in _BY_CLASS[name]:
        if not projector.towers or kind in projector.towers:
            return projector
        known += projector.towers
    raise QuantkitError(
        f"{config.path}: a tower of type {str(kind)[:80]!r} is not supported, only {' and '.join(known)}"
    )


def _wrapper(config: Config) -> str:
    """The class that the root of config.json names, where the text model's part names another."""
    names = config.find("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


__all__ = ["PROJECTORS", "Projector", "classes", "load_projector"]
