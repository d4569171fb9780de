"""The families of models that quantkit knows, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantkit.architectures.base import Architecture, Assembly, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.llama import Llama
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo

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


def forward_spec(metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
    """The forward pass of the model with this metadata and these tensors, from its `general.architecture`.

    Raises QuantkitError for an architecture that no family covers, and for metadata that contradicts itself.
    """
    families = {family.gguf_name: family for family in FAMILIES}
    family = families.get(metadata.architecture)
    if family is None:
        known = ", ".join(sorted(families))
        raise QuantkitError(f"evaluating the architecture {metadata.architecture!r} is not supported, only {known}")
    return family.forward_spec(metadata, tensors)


__all__ = ["FAMILIES", "Architecture", "Assembly", "Config", "Transform", "forward_spec", "load_architecture"]
