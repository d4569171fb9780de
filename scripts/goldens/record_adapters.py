"""Record LoRA adapters as PEFT makes them, what it merges them to, and what the reference converter makes of them.

    python scripts/goldens/record_adapters.py LLAMA_CPP [NAME ...]

LLAMA_CPP is llama.cpp's source directory; needs torch, transformers and peft. Writes tests/goldens/adapters/NAME/: the
adapter, on a tiny checkpoint of make_checkpoints.py; `merged.safetensors`, the first rows of each matrix that it
changes after PEFT's merge in float32; and `reference.json`, what convert_lora_to_gguf.py makes of it, in several types,
as record_goldens.py records models. There is no such record where the converter is known to be wrong.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_checkpoints import make_checkpoint
from record_goldens import describe, render
from record_logits import runnable

GOLDENS = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "adapters"
# In "auto" the reference fails.
OUTTYPES = ("f32", "f16", "bf16", "q8_0")
ROWS = 3
CARD = """---
base_model: example-org/Base-Model-7B-v1.5
library_name: peft
license: apache-2.0
tags:
- lora
---

# An adapter of a test
"""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# By name: the checkpoint, PEFT's settings, the type that it is stored in, and whether the reference converts it right.
ADAPTERS: dict[str, tuple[str, dict[str, Any], torch.dtype, bool]] = {
    "llama-lora": (
        "tiny-llama3-scaling",
        {"r": 4, "lora_alpha": 10, "target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
        torch.float32,
        True,
    ),
    "qwen3-lora": (
        "tiny-qwen3",
        {"r": 32, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        torch.bfloat16,
        True,
    ),
    "falcon-lora": ("tiny-falcon-40b", {"r": 3, "target_modules": ["query_key_value", "dense"]}, torch.float16, True),
    "gemma-lora": (
        "tiny-gemma3",
        {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
        torch.float32,
        True,
    ),
    # The scales of these are not alpha / rank, which the reference assumes.
    "llama-patterns": (
        "tiny-llama3-scaling",
        {
            "r": 4,
            "lora_alpha": 10,
            "target_modules": LINEAR,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 6, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {r"layers\.0\..*_proj": 3, "down_proj": 24},
        },
        torch.float32,
        False,
    ),
    # The reference transposes the factors of matrices that are stored transposed, which are not.
    "gpt2-lora": (
        "tiny-gpt2",
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        torch.float32,
        False,
    ),
}


def make(name: str, scratch: Path, directory: Path) -> Path:
    """Write the adapter and the merged rows; returns the base's checkpoint."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    recipe, settings, dtype, _ = ADAPTERS[name]
    base = make_checkpoint(recipe, scratch / name)
    plain = AutoModelForCausalLM.from_pretrained(runnable(base, scratch / name), dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(len(name))
    changed = []
    for path, module in model.named_modules():
        for ending in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            for tensor in (getattr(module, ending, None) or {}).values():
                data = tensor if isinstance(tensor, torch.Tensor) else tensor.weight
                data.data = (torch.randn(data.shape, generator=generator) * 0.1).to(dtype).to(torch.float32)
                changed.append(path.removeprefix("base_model.model."))
    for path, tensor in model.named_parameters():
        if "modules_to_save" in path:
            tensor.data = tensor.data + torch.randn(tensor.shape, generator=generator) * 0.1
            changed.append(path.split(".modules_to_save")[0].removeprefix("base_model.model."))
    made = scratch / f"{name}-adapter"
    if dtype != torch.float32:
        model.to(dtype)
    # The embedding and the output are changed by factors, and not to be saved whole.
    model.save_pretrained(made, save_embedding_layers=False)
    model.to(torch.float32)
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((made / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"example-org/{recipe}"
    for key in ("target_modules", "modules_to_save"):
        config[key] = sorted(config[key]) if config[key] else config[key]
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (directory / "adapter_model.safetensors").write_bytes((made / "adapter_model.safetensors").read_bytes())
    (directory / "README.md").write_text(CARD)
    # The base as it was: moving to another type and back rounds it.
    again = AutoModelForCausalLM.from_pretrained(scratch / name / f"{recipe}-runnable", dtype=torch.float32)
    from peft import PeftModel

    whole = PeftModel.from_pretrained(again, directory).merge_and_unload().state_dict()
    rows = {f"{path}.weight": whole[f"{path}.weight"][:ROWS].clone() for path in dict.fromkeys(changed)}
    save_file(rows, directory / "merged.safetensors")
    return base


def convert(directory: Path, base: Path, outtype: str, out: Path) -> Path:
    """Run the reference's script, with its default file name."""
    out.mkdir(parents=True)
    sys.argv = [
        "convert_lora_to_gguf.py", str(directory), "--base", str(base), "--outtype", outtype, "--outfile", str(out),
    ]  # fmt: skip
    runpy.run_path(str(Path(sys.path[0]) / "convert_lora_to_gguf.py"), run_name="__main__")
    (made,) = out.glob("*.gguf")
    return made


def main() -> None:
    """Record the adapters named, or all."""
    source = Path(sys.argv[1]).resolve()
    wanted = sys.argv[2:] or list(ADAPTERS)
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for adapter in wanted:
            base = make(adapter, scratch, GOLDENS / adapter)
            print(adapter)
            if not ADAPTERS[adapter][3]:
                continue
            files = {
                outtype: describe(convert(GOLDENS / adapter, base, outtype, scratch / "made" / adapter / outtype))
                for outtype in OUTTYPES
            }
            for outtype in OUTTYPES[1:]:
                files[outtype] = {key: files[outtype][key] for key in ("file", "sha256")}
            (GOLDENS / adapter / "reference.json").write_text(render(files) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
