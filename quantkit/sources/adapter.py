"""A LoRA adapter as PEFT saves it (Hu et al., 2021), seen as GGUF: what llama.cpp's convert_lora_to_gguf.py writes.

An adapter changes a matrix W of its base model by scale * B A, with A [rank, inputs] and B [outputs, rank]. GGUF has
the two as `NAME.lora_a` and `NAME.lora_b` of the tensor NAME, and one `adapter.lora.alpha`: the scale is alpha / rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.architectures import Architecture, Assembly, Transform, load_architecture
from quantkit.architectures.base import Rearrange
from quantkit.architectures.config import Config
from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata
from quantkit.formats.safetensors import SafetensorsCheckpoint, StoredTensor, read_json
from quantkit.sources.checkpoint import CheckpointSource, OutType

CONFIG = "adapter_config.json"
_MAX_CONFIG = 1 << 20  # bytes
_MAX_PATTERN = 400  # characters
# Expressions that could take forever: repeated groups, or many repetitions.
_REPEATED = re.compile(r"\)[*+?{]|[*+?{].*[*+?{].*[*+?{]", re.DOTALL)
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(?(embedding)|\.weight)")
# Fields of the config that mean another product than scale * B A, and what they are called.
_OTHER_KINDS = {"use_dora": "DoRA", "use_qalora": "QALoRA", "layer_replication": "replicated layers"}


@dataclass
class _Pair:
    """The names of the two stored tensors of a module."""

    module: str
    embedding: bool
    A: str = ""
    B: str = ""


class AdapterSource(CheckpointSource):
    """The TensorSource of an adapter's directory, whose base model has the hyper-parameters and names of `base`.

    `outtype` is the type of its matrices, `name` overrides `general.name`. `whole` are the tensors that it holds
    entirely, in place of the base model's, rather than as a product. What alpha alone cannot say (rank-stabilised LoRA,
    an alpha of its own for some modules) is multiplied into B. Raises QuantkitError for what is no LoRA adapter, is
    malformed, or does not fit the base model.
    """

    def __init__(self, directory: Path, base: Architecture, outtype: OutType = "f32", name: str | None = None) -> None:
        self.directory, self._name, self._allow_nonfinite = Path(directory), name, False
        self.architecture = base
        self.settings = _settings(self.directory)
        self.alpha = self.settings.required_number("lora_alpha")
        if self.alpha == 0:
            raise QuantkitError(f"{self.settings.path}: lora_alpha is 0: the adapter changes nothing")
        self._is_packed = False
        self._checkpoint = SafetensorsCheckpoint(self.directory, stem="adapter_model")
        self.type = self._guess(self._checkpoint.tensors) if outtype == "auto" else GGMLType.parse(outtype)
        self.whole: list[str] = []
        self._lay_out(self._factors())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is opened again: by the absolute path, for another process."""
        base = self.architecture.config.path.parent.absolute()
        return _reopened, (self.directory.absolute(), base, self.type.name.lower(), self._name)

    @property
    def invocation(self) -> list[int]:
        """The tokens after which an activated LoRA begins to act; none for others, which always act."""
        tokens = self.settings.find("alora_invocation_tokens")
        if tokens is None and self.settings.find("invocation_string"):
            raise QuantkitError(f"{self.settings.path}: an invocation_string without alora_invocation_tokens")
        if not isinstance(tokens or [], list) or not all(isinstance(t, int) and 0 <= t < 1 << 31 for t in tokens or []):
            raise self.settings.wrong(("alora_invocation_tokens",), tokens, "a list of token ids")
        return tokens or []

    def check_for_file(self) -> None:
        """Refuse an adapter with tensors that no runtime takes from a GGUF adapter. Norms it skips, others not."""
        if others := [name for name in self.whole if not name.endswith("_norm.weight")]:
            raise QuantkitError(
                f"{self.directory}: it holds the whole tensor {others[0]} (of modules_to_save, or a bias), which a "
                "GGUF adapter cannot; merge it into its base model instead"
            )

    def _factors(self) -> Iterator[Assembly]:
        """The GGUF tensors of the adapter, in the reference converter's order."""
        pairs: dict[str, _Pair] = {}
        stored: dict[str, StoredTensor] = {}
        for name, tensor in self._checkpoint.tensors.items():
            plain = name.replace(_PREFIX, "")
            match = _FACTOR.fullmatch(plain)
            if match is None:
                if ".base_layer." in plain:
                    continue
                if ".lora_" in plain:
                    raise QuantkitError(f"{tensor.path}: tensor {name!r} is no part of a LoRA adapter")
                stored[plain] = tensor
                continue
            if len(tensor.shape) != 2:
                raise QuantkitError(f"{tensor.path}: tensor {name!r} of shape {tensor.shape} is no matrix")
            weight = f"{match['module']}.weight"
            pair = pairs.setdefault(weight, _Pair(match["module"], match["embedding"] is not None))
            setattr(pair, match["which"], name)
            stored[weight] = tensor
        for weight, pair in pairs.items():
            self._check(pair)
            if f"{_PREFIX}{weight}" in self._checkpoint.tensors:
                raise QuantkitError(f"{self.directory}: it holds {weight} whole, and factors that change it")
        # The products come after the tensors that are whole.
        ordered = {name: stored[name] for name in (*(n for n in stored if n not in pairs), *pairs)}
        for assembly in self.architecture.assemblies(ordered):
            if not any(part in pairs for part in assembly.parts):
                self.whole.append(assembly.name)
                parts = tuple(stored[part].name for part in assembly.parts)
                yield replace(assembly, parts=parts)
            else:
                yield from self._product(assembly, [pairs[part] for part in assembly.parts])

    def _check(self, pair: _Pair) -> None:
        if not pair.A or not pair.B:
            raise QuantkitError(f"{self.directory}: {pair.module} has no lora_{'B' if pair.A else 'A'}")
        a, b = (self._checkpoint.tensors[name] for name in (pair.A, pair.B))
        if a.shape[0] != b.shape[1] or not a.shape[0]:
            raise QuantkitError(f"{b.path}: {b.name!r} of shape {b.shape} does not fit {a.name!r} of shape {a.shape}")

    def _product(self, assembly: Assembly, pairs: list[_Pair]) -> Iterator[Assembly]:
        """The factors of what the modules `pairs` change in the tensor `assembly`."""
        transform, name = assembly.transform, assembly.name
        factors = {self._factor(pair) for pair in pairs}
        embedding = pairs[0].embedding
        if embedding != (name == "token_embd.weight"):
            raise QuantkitError(
                f"{self.directory}: {pairs[0].module}: only the token embedding is changed by embeddings"
            )
        if transform.arithmetic is not None or transform.n_axes is not None or len(factors) > 1:
            raise QuantkitError(f"{self.directory}: what it changes in {name} is no product in GGUF")
        factor = factors.pop()
        scaled = None if factor == 1 else lambda rows: rows.astype(np.float32) * np.float32(factor)
        steps = transform.rearrange
        if steps is None:
            steps = (lambda _, stored: stored,) if embedding else ()
        elif not isinstance(steps, tuple):
            steps = (steps,)
        rows = tuple(_as_rows_of(step, embedding) for step in steps) or None
        a, b = Transform(columns=transform.columns), Transform(rows, scaled)
        if embedding:  # its rows are looked up, so it is A whose rows GGUF has
            a, b = Transform(rows), Transform(arithmetic=scaled)
        yield Assembly(f"{name}.lora_a", tuple(pair.A for pair in pairs), a, assembly.stacked)
        yield Assembly(f"{name}.lora_b", tuple(pair.B for pair in pairs), b, assembly.stacked)

    def _factor(self, pair: _Pair) -> float:
        """What B is multiplied by, so that alpha / rank is the scale of this module."""
        alphas = self.settings.table("alpha_pattern") or {}
        alpha = next((alphas[key] for key in alphas if self._matches(key, pair.module)), self.alpha)
        factor = self.settings.finite(alpha, ("alpha_pattern",)) / self.alpha
        rank = self._checkpoint.tensors[pair.A].shape[0]
        return factor * math.sqrt(rank) if self.settings.find("use_rslora") else factor

    def _matches(self, pattern: str, module: str) -> bool:
        """Whether a pattern of PEFT's names `module`: an expression for the end of its name, from a dot on."""
        try:
            if len(pattern) > _MAX_PATTERN or _REPEATED.search(pattern):
                raise re.error("too complicated")
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
        except (re.error, RecursionError, OverflowError) as error:
            raise QuantkitError(f"{self.settings.path}: alpha_pattern {pattern[:80]!r}: {error}") from None

    def _type_of(self, name: str, shape: tuple[int, ...]) -> GGMLType:
        if not name.endswith((".lora_a", ".lora_b")):
            return super()._type_of(name, shape)
        return self.type if shape[-1] % self.type.block_size == 0 else GGMLType.F16

    @cached_property
    def metadata(self) -> Metadata:
        """Everything that a GGUF file of this adapter holds before its tensors, in the reference converter's order."""
        import gguf

        writer = self._new_writer()
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        self._write_general(writer)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, self.alpha)
        if self.invocation:
            kinds = gguf.GGUFValueType
            key = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS
            writer.add_key_value(key, self.invocation, kinds.ARRAY, kinds.UINT32)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        return self._metadata_of(writer)


def open_adapter(
    adapter: str, base: str | None = None, outtype: OutType = "f32", name: str | None = None
) -> AdapterSource:
    """Open a PEFT adapter, a directory or a hub id.

    `base` is its base model, a checkpoint directory or a hub id, of which only the config is read; left out, it is the
    one that the adapter names. Raises QuantkitError.
    """
    from quantkit.sources.hub import is_hub_id, resolve

    directory = resolve(adapter, patterns=(CONFIG, "adapter_model*.safetensors", "README.md"), needed=CONFIG)
    if base is None:
        base = _settings(directory).find("base_model_name_or_path")
        if not isinstance(base, str) or not (Path(base).is_dir() or is_hub_id(base)):
            raise QuantkitError(f"{directory / CONFIG}: it names no base model that is there", option="base")
    # What a family needs to know of its vocabulary, it reads from these.
    home = resolve(base, patterns=("config.json", "tokenizer*", "added_tokens.json"))
    return AdapterSource(directory, load_architecture(home), outtype, name)


def _reopened(directory: Path, base: Path, outtype: OutType, name: str | None) -> AdapterSource:
    return AdapterSource(directory, load_architecture(base), outtype, name)


def _settings(directory: Path) -> Config:
    """adapter_config.json. Raises QuantkitError for one that is not of a plain LoRA adapter."""
    path = directory / CONFIG
    if not path.is_file():
        raise QuantkitError(f"{directory}: it has no {CONFIG}; a LoRA adapter as PEFT saves it is needed")
    settings = Config(read_json(path, _MAX_CONFIG), path)
    kind = settings.find("peft_type")
    if kind != "LORA":
        raise QuantkitError(f"{path}: an adapter of the type {str(kind)[:40]!r}; only LORA is supported")
    for field, called in _OTHER_KINDS.items():
        if settings.find(field):
            raise QuantkitError(f"{path}: {called} ({field}) is not supported; merge the adapter with PEFT instead")
    return settings


def _as_rows_of(step: Rearrange, embedding: bool) -> Rearrange:
    """`step`, which moves rows of a weight, for the factor that has these rows and ranks for columns.

    Some checkpoints store weights transposed, and not the factors: then `step` transposes, and takes the factor so.
    """

    def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
        rows = stored.T if embedding else stored
        for seen in (rows, rows.T):
            try:
                view = step(config, seen)
            except (ValueError, IndexError):
                continue
            if view.shape[-1] == rows.shape[-1] and view.strides[-1] == rows.strides[-1]:
                return view
        raise ValueError

    return rearrange
