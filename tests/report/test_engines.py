"""A published directory in the engines that read it: llama.cpp, and transformers through gguf_file."""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest
from conftest import SHARED, requires_reference, requires_shared, requires_torch
from support.llama_reference import llama_logits

import quantkit
from quantkit.evaluate.backends import load
from quantkit.evaluate.settings import Chunking
from quantkit.report.data import NamedText
from quantkit.report.ladder import Ladder, LadderOptions
from quantkit.report.lint import ERROR, lint
from quantkit.report.publish import contents

requires_transformers = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "accelerate"))),
    reason="transformers and accelerate, which it reads GGUF files with, are not installed",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory, docs_llama):
    directory = tmp_path_factory.mktemp("docs") / "out"
    text = NamedText("docs-test.txt", (SHARED / "data" / "docs-test.txt").read_text("utf-8")[:20_000])
    options = LadderOptions(types=["Q8_0", "Q4_K_M"], texts=[text], chunking=Chunking(chunks=2), n_prompts=0)
    run = Ladder(quantkit.open_model(docs_llama), directory, options)
    run.quantize()
    run.measure()
    run.write()
    return directory


@requires_shared
@requires_reference
def test_llama_cpp_loads_what_would_be_published(published):
    files = [item.path for item in contents(published) if item.name.endswith(".gguf")]
    assert len(files) == 2
    assert [finding for finding in lint(published) if finding.level == ERROR] == []
    tokens = list(range(100, 140))
    for path in files:
        ours = load(path).logits(np.array([tokens], np.int32))[0, -1]
        theirs = np.asarray(llama_logits(path, tokens))[-1]
        assert ours.argmax() == theirs.argmax()


@requires_shared
@requires_torch
@requires_transformers
def test_transformers_reads_the_files(published, docs_llama):
    import torch
    from transformers import AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokens = np.arange(100, 164, dtype=np.int32)[None]
    path = next(published.glob("*-Q8_0.gguf"))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(published, gguf_file=path.name, dtype=torch.float32)
        theirs = model(torch.from_numpy(tokens.astype(np.int64))).logits[0].numpy()
        original = AutoModelForCausalLM.from_pretrained(docs_llama, dtype=torch.float32)
        before = original(torch.from_numpy(tokens.astype(np.int64))).logits[0].numpy()
    assert np.abs(load(path).logits(tokens)[0] - theirs).max() < 2e-3
    # Rounding to 8 bits may swap tokens that are equally likely, and no others.
    first, second = np.sort(before, axis=-1)[:, -1], np.sort(before, axis=-1)[:, -2]
    clear = first - second > 2 * np.abs(theirs - before).max()
    assert clear.mean() > 0.25
    assert (theirs.argmax(-1) == before.argmax(-1))[clear].all()
