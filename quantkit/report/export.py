"""What engines need beside a GGUF file: a Modelfile for Ollama, `params` and `system` for its pulls from the hub,
configuration and tokenizer for vLLM."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata
from quantkit.sources.source import TensorSource

# Ollama's names of the sampling settings in GGUF files.
_PARAMETERS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}
_VLLM_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def ollama_parameters(metadata: Metadata) -> dict[str, Any]:
    """Sampling settings and stop tokens of a model, under Ollama's names: what its `params` file holds."""
    settings: dict[str, Any] = {}
    for key, name in _PARAMETERS.items():
        value = metadata.scalar(f"general.sampling.{key}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            settings[name] = value if isinstance(value, int) else round(value, 6)
    stops = _stops(metadata)
    if stops:
        settings["stop"] = stops
    return settings


def _stops(metadata: Metadata) -> list[str]:
    """The texts of the tokens that end an answer."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return []
    texts = list(tokens.strings()) if hasattr(tokens, "strings") else list(tokens.value)
    found = []
    for name in ("eos", "eot", "eom"):
        at = metadata.scalar(f"tokenizer.ggml.{name}_token_id")
        if isinstance(at, int) and 0 <= at < len(texts) and texts[at] and texts[at] not in found:
            found.append(str(texts[at]))
    return found


def modelfile(file: str, metadata: Metadata, system: str | None = None, template: str | None = None) -> str:
    """Ollama's Modelfile for the GGUF file of this name beside it.

    Ollama (0.30 and later) renders the file's own chat template, so none is written unless `template`, in Go's syntax,
    is given. Raises QuantkitError where a text cannot be quoted in a Modelfile.
    """
    lines = [f"FROM ./{file}"]
    for name, value in ollama_parameters(metadata).items():
        for each in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {name} {json.dumps(each, ensure_ascii=False) if isinstance(each, str) else each}")
    if template is not None:
        lines.append(f"TEMPLATE {_quoted('template', template)}")
    if system is not None:
        lines.append(f"SYSTEM {_quoted('system message', system)}")
    license_name = metadata.scalar("general.license.name") or metadata.scalar("general.license")
    if isinstance(license_name, str) and license_name:
        link = metadata.scalar("general.license.link")
        lines.append(f"LICENSE {_quoted('license', license_name + (f' {link}' if isinstance(link, str) else ''))}")
    return "\n".join(lines) + "\n"


def _quoted(what: str, text: str) -> str:
    if '"""' in text:
        raise QuantkitError(f"the {what} holds three quotes in a row, which a Modelfile cannot express")
    return f'"""{text}"""'


def only_file(directory: Path) -> Path:
    """The GGUF file of a directory. Raises QuantkitError when there is none, or several."""
    found = sorted(directory.glob("*.gguf"))
    if len(found) != 1:
        raise QuantkitError(f"{directory}: holds {len(found) or 'no'} GGUF files; name one of them")
    return found[0]


def hub_files(metadata: Metadata, system: str | None = None, template: str | None = None) -> dict[str, str]:
    """The files in a hub repository's root that Ollama reads when it pulls from there, by name."""
    result = {}
    if parameters := ollama_parameters(metadata):
        result["params"] = json.dumps(parameters, indent=2, ensure_ascii=False) + "\n"
    if system is not None:
        result["system"] = system
    if template is not None:
        result["template"] = template
    return result


def vllm_files(source: TensorSource) -> Mapping[str, Path]:
    """The files of the checkpoint `source` that vLLM's GGUF plugin needs beside a GGUF file, by name.

    Raises QuantkitError when the source is not a checkpoint, or has no config.json.
    """
    directory = getattr(source, "directory", None)
    if directory is None:
        raise QuantkitError(f"{source.label}: vLLM needs config.json and the tokenizer of the original checkpoint")
    present = {name: Path(directory) / name for name in _VLLM_FILES if (Path(directory) / name).is_file()}
    if "config.json" not in present:
        raise QuantkitError(f"{source.label}: has no config.json")
    return present
