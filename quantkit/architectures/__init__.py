"""The families of models that quantkit knows, one file each."""

from __future__ import annotations

from pathlib import Path

from quantkit.architectures.base import Architecture, Assembly, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.llama import Llama
from quantkit.errors import QuantkitError

FAMILIES: tuple[type[Architecture], ...] = (Llama,)

BY_CLASS = {name: family for family in FAMILIES for name in family.checkpoints}


def load_architecture(directory: Path) -> Architecture:
    """The architecture of the checkpoint in `directory`, from its config.json.

    Raises QuantkitError for a model class that no family covers; the message lists those that are.
    """
    config = Config.load(directory)
    name = config.model_class
    family = BY_CLASS.get(name)
    if family is None:
        known = ", ".join(sorted(BY_CLASS))
        raise QuantkitError(f"{config.path}: the architecture {name} is not supported; supported: {known}")
    return family(config)


__all__ = ["FAMILIES", "Architecture", "Assembly", "Config", "Transform", "load_architecture"]
