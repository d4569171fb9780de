"""The model card of a directory of GGUF files: README.md with the front matter that the hub reads.

The generated text is between two markers; text outside them, and front matter under other keys, is kept when the card
is written again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from quantkit.errors import QuantkitError
from quantkit.report.tables import table
from quantkit.sources.front_matter import refuse_bombs_in

Data = Mapping[str, Any]

BEGIN, END = "<!-- quantkit:begin -->", "<!-- quantkit:end -->"
_FRONT = re.compile(r"\A---\r?\n(?P<yaml>.*?)^---\r?\n?", re.DOTALL | re.MULTILINE)
_LARGEST = 1 << 20
_PLACEHOLDER = "ORG/NAME-GGUF"


def render(report: Data, repo: str | None = None, existing: str = "") -> str:
    """The card of `report`, report.json's data, for the repository `repo`, with what was added to `existing` by hand.

    Raises QuantkitError when the markers or the front matter of `existing` are damaged.
    """
    if len(existing) > _LARGEST:
        raise QuantkitError("README.md: too large for a model card")
    kept, body = _parsed(existing)
    before, _, rest = body.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if BEGIN in body and not mark:
        raise QuantkitError(f"README.md: has {BEGIN} but no {END} after it: put it back, or remove both")
    if BEGIN not in body:
        before, after = "", f"\n\n{body.strip()}\n" if body.strip() else "\n"
    front = {**front_matter(report), **{k: v for k, v in kept.items() if k not in _OWN}}
    return f"---\n{_yaml(front)}---\n{before or chr(10)}{BEGIN}\n{_generated(report, repo or _PLACEHOLDER)}{END}{after}"


def _parsed(existing: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card, and the rest."""
    match = _FRONT.match(existing)
    if match is None:
        return {}, existing
    import yaml

    refuse_bombs_in(match[0].encode(), "README.md")
    try:
        loaded = yaml.safe_load(match["yaml"])
    except (yaml.YAMLError, RecursionError) as error:
        problem = (str(error).splitlines() or ["damaged"])[0]
        raise QuantkitError(f"README.md: its front matter is not valid YAML ({problem})") from None
    if loaded is not None and not isinstance(loaded, dict):
        raise QuantkitError("README.md: its front matter is not a mapping of keys to values")
    return dict(loaded or {}), existing[match.end() :]


def _yaml(front: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1000))


_OWN = ("base_model", "base_model_relation", "quantized_by", "library_name", "tags", "datasets", "license",
        "license_name", "license_link", "language", "pipeline_tag")  # fmt: skip


def front_matter(report: Data) -> dict[str, Any]:
    """The front matter that the hub reads: where the model comes from, and what it is."""
    model = report["model"]
    tags = ["gguf"]
    if report["calibration"] is not None or report["imatrix"] is not None:
        tags.append("imatrix")
    if model["prompt_format"] is not None:
        tags.append("conversational")
    tags += [tag for tag in (model["architecture"], *model["tags"]) if tag not in tags]
    calibration = report["calibration"] or {}
    datasets = [*model["datasets"], *([calibration["dataset"]] if calibration.get("dataset") else [])]
    front = {
        "base_model": model["base_model"],
        "base_model_relation": "quantized" if model["base_model"] else None,
        "quantized_by": "quantkit",
        "pipeline_tag": model["pipeline_tag"],
        "library_name": "gguf",
        "license": model["license"],
        "license_name": model["license_name"],
        "license_link": model["license_link"],
        "language": model["languages"],
        "datasets": list(dict.fromkeys(datasets)),
        "tags": tags,
    }
    return {key: value for key, value in front.items() if value}


def _generated(report: Data, repo: str) -> str:
    model, files = report["model"], report["files"]
    default = next((f for f in files if f["type"] == "Q4_K_M"), files[len(files) // 2])
    parts = [
        f"# {model['name']} GGUF",
        "",
        _origin(report),
        "",
        "## Files",
        "",
        _files(report, repo),
        "",
        _advice(report),
    ]
    if model["prompt_format"] is not None:
        parts += ["", "## Prompt format", "", "```", model["prompt_format"].rstrip("\n"), "```"]
    parts += ["", "## Running", "", _commands(report, repo, default), "", "## How it was made", "", _method(report), ""]
    return "\n".join(parts)


def _origin(report: Data) -> str:
    base = report["model"]["base_model"]
    what = f"[{base}](https://huggingface.co/{base})" if base else report["model"]["name"]
    first = report["texts"][0]
    return (
        f"GGUF files of {what}, each measured against the original: KLD is the mean Kullback-Leibler divergence of its "
        f"predictions on {first['text']} ({first['n_tokens']:,} tokens), in nats; 0 is no change. The whole report is "
        "in [report.html](report.html)."
    )


def _files(report: Data, repo: str) -> str:
    text = report["texts"][0]["text"]
    rows = []
    for file in report["files"]:
        measured = next(m for m in file["measurements"] if m["text"] == text)
        address = f"https://huggingface.co/{repo}/resolve/main/{quote(file['path'])}?download=true"
        link = file["path"] if repo == _PLACEHOLDER else f"[{file['path']}]({address})"
        rows.append(
            [
                link,
                file["type"],
                f"{file['size'] / 2**30:.2f} GiB" if file["size"] >= 2**28 else f"{file['size'] / 2**20:.1f} MiB",
                f"{file['bits_per_weight']:.2f}",
                f"{measured['kld']['value']:.5f}",
                f"{measured['ratio']['value']:.4f}",
                f"{100 * measured['same_top']['value']:.1f}%",
                _note(file["type"]),
            ]
        )
    return table(["file", "type", "size", "bits/weight", "mean KLD", "PPL ratio", "same top", "notes"], rows, left=2)


def is_disjoint(report: Data) -> bool:
    """Whether nothing of the texts measured is known to be in the calibration text."""
    return not any(text["shared_with_calibration"] for text in report["texts"])


def _note(kind: str) -> str:
    """One line on what a type is good for."""
    if kind in ("F32", "F16", "BF16"):
        return "full precision: for further work, not for running"
    if kind == "Q8_0":
        return "as good as the original, at half its size"
    if kind == "Q6_K" or kind.startswith("Q5"):
        return "practically indistinguishable from the original"
    if kind.startswith("Q4_K") or kind == "IQ4_XS":
        return "the usual choice"
    if kind.startswith("IQ"):
        return "small; slower than K-quants on some CPUs"
    return "legacy" if kind in ("Q4_0", "Q4_1") else "small; noticeably worse"


def _advice(report: Data) -> str:
    lines = [
        "**Which file?** Take the largest that leaves 1 to 2 GB of your memory (of the GPU's, to run it all there) "
        "free for the context. K-quants (`Q4_K_M`) are fast everywhere; I-quants (`IQ4_XS`, `IQ3_M`) are smaller for "
        "the same quality, and slower on CPUs and Apple's GPUs."
    ]
    recommendations = report.get("recommendations")
    if recommendations:
        lines += ["", *(f"- {line}" for line in recommendations["advice"])]
    return "\n".join(lines)


def _commands(report: Data, repo: str, default: Data) -> str:
    kind, base = default["type"], report["model"]["base_model"]
    tokenizer = f" --tokenizer {base}" if base else ""
    return "\n".join(
        [
            f"- llama.cpp: `llama-cli -hf {repo}:{kind}`",
            f"- Ollama: `ollama run hf.co/{repo}:{kind}`",
            f"- vLLM (with vllm-gguf-plugin): `vllm serve {repo}:{kind}{tokenizer}`",
            f"- LM Studio: search for `{repo}` and choose {kind}",
            f'- transformers: `AutoModelForCausalLM.from_pretrained("{repo}", gguf_file="{default["path"]}")`',
        ]
    )


def _method(report: Data) -> str:
    calibration, rounding = report["calibration"], report["rounding"]
    lines = [f"quantkit {report['quantkit']}, from {report['source']['name']} ({report['source']['type']})."]
    if rounding == "nearest":
        lines.append("The bytes are those that llama-quantize writes.")
    else:
        lines.append(f"Rounded with error feedback ({rounding}): ordinary GGUF types with smaller errors.")
    if calibration is not None:
        lines.append(f"Calibration: {calibration['text']} (sha256 {calibration['sha256'][:16]}…).")
    names = ", ".join(text["text"] for text in report["texts"])
    apart = ", which are not in the calibration text" if calibration is not None and is_disjoint(report) else ""
    lines.append(f"Measured on {names}{apart}.")
    return " ".join(lines) + f"\n\n```sh\n{report['reproduce']['command']}\n```"
