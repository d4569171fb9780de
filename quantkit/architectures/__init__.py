"""The families of models that quantkit knows, one file each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.architectures.apertus import Apertus
from quantkit.architectures.bailing import Bailing, Bailing2
from quantkit.architectures.base import Architecture, Assembly, Transform
from quantkit.architectures.bert import Bert, DistilBert, Roberta, XlmRoberta
from quantkit.architectures.command_r import Cohere2, CommandR
from quantkit.architectures.config import Config
from quantkit.architectures.deepseek2 import DeepSeek2
from quantkit.architectures.dots1 import Dots1
from quantkit.architectures.ernie4_5 import Ernie, ErnieMoe
from quantkit.architectures.eurobert import EuroBert
from quantkit.architectures.exaone4 import Exaone4
from quantkit.architectures.falcon import Falcon
from quantkit.architectures.falcon_h1 import FalconH1
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.gemma import Gemma
from quantkit.architectures.gemma2 import Gemma2
from quantkit.architectures.gemma3 import Gemma3
from quantkit.architectures.gemma3n import Gemma3n
from quantkit.architectures.gemma4 import Gemma4, Gemma4Unified
from quantkit.architectures.glm4 import Glm4
from quantkit.architectures.glm4_moe import Glm4Moe
from quantkit.architectures.gpt2 import GPT2
from quantkit.architectures.gpt_neox import GPTNeoX
from quantkit.architectures.gpt_oss import GptOss
from quantkit.architectures.granite import Granite, GraniteMoe
from quantkit.architectures.granite_hybrid import GraniteHybrid
from quantkit.architectures.hunyuan import HunyuanDense, HunyuanMoe
from quantkit.architectures.internlm2 import InternLM2, InternLM3
from quantkit.architectures.jamba import Jamba
from quantkit.architectures.jina_bert import JinaBert
from quantkit.architectures.lfm2 import Lfm2, Lfm2Moe
from quantkit.architectures.llama import Llama
from quantkit.architectures.llama4 import Llama4
from quantkit.architectures.mamba import Mamba
from quantkit.architectures.mamba2 import Mamba2
from quantkit.architectures.minicpm import MiniCPM
from quantkit.architectures.minimax_m2 import MiniMaxM2
from quantkit.architectures.mistral3 import Mistral3
from quantkit.architectures.mixtral import Mixtral
from quantkit.architectures.modern_bert import ModernBert
from quantkit.architectures.nemotron import Nemotron
from quantkit.architectures.nemotron_h import NemotronH, NemotronHMoe
from quantkit.architectures.nomic_bert import NomicBert, NomicBertMoe
from quantkit.architectures.olmo import Olmo
from quantkit.architectures.olmo2 import Olmo2
from quantkit.architectures.olmoe import Olmoe
from quantkit.architectures.phi2 import Phi2
from quantkit.architectures.phi3 import Phi3
from quantkit.architectures.phimoe import PhiMoe
from quantkit.architectures.qwen2 import Qwen2
from quantkit.architectures.qwen2_moe import Qwen2Moe
from quantkit.architectures.qwen3 import Qwen3
from quantkit.architectures.qwen3_moe import Qwen3Moe
from quantkit.architectures.qwen3_next import Qwen3Next, Qwen35, Qwen35Moe
from quantkit.architectures.qwen_vl import Qwen2Vl, Qwen3Asr, Qwen3OmniMoe, Qwen3Vl, Qwen3VlMoe
from quantkit.architectures.rwkv7 import Rwkv7
from quantkit.architectures.seed_oss import SeedOss
from quantkit.architectures.smollm3 import SmolLM3
from quantkit.architectures.stablelm import StableLm
from quantkit.architectures.starcoder2 import StarCoder2
from quantkit.architectures.t5 import T5, T5Encoder
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo
from quantkit.wording import did_you_mean

# Every family, one line each.
FAMILIES: tuple[type[Architecture], ...] = (
    Llama,
    Mixtral,
    Mistral3,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma2,
    Gemma3,
    Phi3,
    GPT2,
    GPTNeoX,
    Olmo2,
    Granite,
    SmolLM3,
    Qwen2Moe,
    SeedOss,
    Gemma,
    Phi2,
    PhiMoe,
    Glm4,
    CommandR,
    Cohere2,
    Olmo,
    Olmoe,
    Exaone4,
    GraniteMoe,
    StableLm,
    StarCoder2,
    Falcon,
    Apertus,
    Nemotron,
    Ernie,
    ErnieMoe,
    Dots1,
    HunyuanDense,
    HunyuanMoe,
    MiniCPM,
    InternLM2,
    InternLM3,
    GptOss,
    Glm4Moe,
    Llama4,
    Bailing,
    Bailing2,
    DeepSeek2,
    Qwen3Next,
    Qwen35,
    Qwen35Moe,
    Qwen2Vl,
    Qwen3Vl,
    Qwen3VlMoe,
    Qwen3OmniMoe,
    Qwen3Asr,
    MiniMaxM2,
    Lfm2,
    Lfm2Moe,
    GraniteHybrid,
    Bert,
    DistilBert,
    Roberta,
    XlmRoberta,
    NomicBert,
    NomicBertMoe,
    ModernBert,
    JinaBert,
    EuroBert,
    Mamba2,
    Mamba,
    FalconH1,
    Jamba,
    NemotronH,
    NemotronHMoe,
    Gemma3n,
    Gemma4,
    Gemma4Unified,
    T5,
    T5Encoder,
    Rwkv7,
)

# The family of each class. Where one covers the classes of another, that one decides between them (`Architecture.of`).
BY_CLASS: dict[str, type[Architecture]] = {}
for _family in FAMILIES:
    for _name in (*_family.checkpoints, *_family.wrappers):
        BY_CLASS.setdefault(_name, _family)


@dataclass(frozen=True)
class Supported:
    """One line of the list of families: its name, the transformers classes, `general.architecture`, what is special.

    All can be converted; those that are `evaluated` can be run too.
    """

    family: str
    classes: tuple[str, ...]
    gguf_name: str
    evaluated: bool
    notes: str


def supported() -> list[Supported]:
    """The families that can be converted, in the order of their names."""
    rows = [
        Supported(f.__name__, (*f.checkpoints, *f.wrappers), f.gguf_name, f.gguf_name in _evaluated(), f.notes)
        for f in FAMILIES
    ]
    return sorted(rows, key=lambda row: row.family.lower())


def load_architecture(directory: Path) -> Architecture:
    """The architecture of the checkpoint in `directory`, from its config.json.

    Raises QuantkitError for a model class that no family covers.
    """
    config = Config.load(directory)
    name = config.model_class
    family = BY_CLASS.get(name)
    if family is None:
        near = _nearest(name)
        raise QuantkitError(
            f"{config.path}: the architecture {name[:80]} is not supported"
            + (f"; the nearest that are: {', '.join(near)}" if near else "")
            + "; `quantkit architectures` lists all, and quantkit/architectures/README.md shows how one is added"
        )
    return family.of(config)


def _nearest(name: str) -> list[str]:
    """The classes whose names are closest to `name`, the endings that all share aside."""
    from difflib import get_close_matches

    def stem(name: str) -> str:
        return re.sub("(For[A-Z]|Model$|LMHead).*", "", name).lower()

    classes = {stem(known): known for known in reversed(BY_CLASS)}
    return [classes[near] for near in get_close_matches(stem(name[:80]), classes, n=3, cutoff=0.6)]


def _evaluated() -> dict[str, type[Architecture]]:
    """The families that say their forward pass, by `general.architecture`.

    A family that inherits another's tensors has not thereby its forward pass: each says its own.
    """
    return {family.gguf_name: family for family in FAMILIES if "forward_spec" in vars(family)}


def forward_spec(metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
    """The forward pass of the model with this metadata and these tensors, from its `general.architecture`.

    Raises QuantkitError for an architecture that no family covers, and for metadata that contradicts itself.
    """
    families = _evaluated()
    family = families.get(metadata.architecture)
    if family is None:
        near = did_you_mean(metadata.architecture, families)
        raise QuantkitError(
            f"evaluating the architecture {metadata.architecture!r} is not supported"
            + (f"; {near}" if near else "; `quantkit architectures` lists those that are")
        )
    spec = family.forward_spec(metadata, tensors)
    if unread := [name for name in tensors if name not in spec.tensors]:
        raise QuantkitError(
            f"evaluating {metadata.architecture} models with the tensor {unread[0][:80]!r} is not supported"
            + (f" ({len(unread) - 1} more are unknown)" if len(unread) > 1 else "")
        )
    return spec


__all__ = [
    "FAMILIES",
    "Architecture",
    "Assembly",
    "Config",
    "Supported",
    "Transform",
    "forward_spec",
    "load_architecture",
    "supported",
]
