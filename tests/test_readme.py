"""The README's Python, run as it stands there."""

from __future__ import annotations

import re

import numpy as np
from conftest import ROOT


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert np.abs(names["back"] - names["weights"]).max() < 0.5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "Tinylm-3.4M-Q4_K_M.gguf",
        "Tinylm-3.4M-Q8_0.gguf",
    }
    assert names["result"].ppl.value < names["cost"].ppl.value
    assert "blk.0.ffn_down.weight" in capsys.readouterr().out
