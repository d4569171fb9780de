"""Record what llama.cpp's older scripts make of LLaVA checkpoints: the tensors and the `clip.` keys of their files.

    python scripts/goldens/record_llava.py LLAMA_CPP [NAME ...]

LLAMA_CPP is llama.cpp's source directory. Needs torch and transformers 4, whose CLIP these scripts were written for.
Each tiny checkpoint called NAME, or all, goes the way of llama.cpp's docs/multimodal/llava.md into
tests/goldens/convert/NAME.json: its tower and its projector are cut out, and made a GGUF file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_checkpoints import LLAVA, make_checkpoint
from record_goldens import GOLDENS, describe, render


def convert(scripts: Path, checkpoint: Path, *options: str) -> Path:
    """Run both scripts; the tower's config gets what the second one reads beside it."""

    def run(script: str, *arguments: str) -> None:
        subprocess.run([sys.executable, str(scripts / script), *arguments], check=True)

    run("llava_surgery_v2.py", "-C", "-m", str(checkpoint))
    tower = checkpoint / "vit"
    tower.mkdir()
    shutil.move(checkpoint / "llava.clip", tower / "pytorch_model.bin")
    config = json.loads((checkpoint / "config.json").read_text())
    beside = {name: config[name] for name in ("vision_feature_layer", "image_grid_pinpoints") if name in config}
    if "image_grid_pinpoints" in config:
        beside["mm_patch_merge_type"] = "spatial_unpad"
    (tower / "config.json").write_text(json.dumps({**config["vision_config"], **beside}))
    images = json.loads((checkpoint / "preprocessor_config.json").read_text())
    channels = [f"--{key.replace('_', '-')}" if i < 0 else str(images[key][i]) for key in images for i in range(-1, 3)]
    projector = str(checkpoint / "llava.projector")
    more = ("--clip-model-is-vision", "--llava-projector", projector, "-m", str(tower), *channels, *options)
    run("convert_image_encoder_to_gguf.py", *more)
    (made,) = tower.glob("*.gguf")
    return made


def main() -> None:
    """Record each checkpoint in both types that the scripts know."""
    source = Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(source / "gguf-py")]
    import transformers

    for name in sys.argv[2:] or LLAVA:
        files: dict[str, Any] = {}
        for outtype, options in (("f16", ()), ("f32", ("--use-f32",))):
            with tempfile.TemporaryDirectory() as scratch:
                checkpoint = make_checkpoint(name, Path(scratch))
                found = describe(convert(source / "tools" / "mtmd" / "legacy-models", checkpoint, *options))
            found["metadata"] = [record for record in found["metadata"] if record[0].startswith("clip.")]
            files[outtype] = {key: found[key] for key in ("metadata", "tensors")}
        text = render({"transformers": transformers.__version__, **files})
        (GOLDENS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
