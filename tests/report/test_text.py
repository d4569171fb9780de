"""Results as text: tables that are Markdown, and what a measurement took."""

from __future__ import annotations

import dataclasses

from conftest import ROOT, TINYLM

from quantkit.evaluate.divergence import divergence
from quantkit.evaluate.perplexity import perplexity
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.evaluate.threads import blas_name
from quantkit.report.measurements import divergence_text, perplexity_text
from quantkit.report.tables import table
from quantkit.sources.source import open_model

TEXT = (ROOT / "fixtures" / "tinylm-test.txt").read_text(encoding="utf-8")


def test_a_table_is_aligned_and_stays_one_whatever_its_cells_hold():
    lines = table(["name", "n"], [["a|b", "10"], ["two\nlines", "7"]]).splitlines()
    assert lines == [
        "| name       |   n |",
        "| ---------- | --: |",
        "| a\\|b       |  10 |",
        "| two\\nlines |   7 |",
    ]


def test_a_perplexity_and_what_it_took():
    result = perplexity(TINYLM, TEXT, chunking=Chunking(n_ctx=128, chunks=4), compute=Compute(threads=1))
    first, second = perplexity_text(result).splitlines()
    assert first == f"PPL = {result.ppl.value:.4f} ± {result.ppl.stderr:.5f}"
    assert second.startswith("4 chunks of 128 tokens, 252 tokens scored, ")
    assert ", batch 4" in second
    assert second.endswith(f"(numpy, f32, {blas_name()})")
    # The process's own peak depends on the tests that ran in it before.
    known = dataclasses.replace(result, memory=1_234_000_000, blas="OpenBLAS")
    assert perplexity_text(known).endswith(", batch 4, peak memory 1.23 GB (numpy, f32, OpenBLAS)")
    unknown = dataclasses.replace(known, memory=None)
    assert perplexity_text(unknown).endswith("batch 4 (numpy, f32, OpenBLAS)")


def test_a_divergence_tells_every_statistic():
    model = open_model(TINYLM)
    result = divergence(model, model, TEXT, chunking=Chunking(n_ctx=128, chunks=2), compute=Compute(threads=1))
    text = divergence_text(result)
    assert "PPL(model) / PPL(base)" in text and "1.000000 ± 0.000000" in text
    for band in result.by_position:
        assert f"| {band.first}-{band.last} " in text
    for kind in result.by_class:
        assert f"| {kind.name} " in text
    assert text.endswith(f"base: {model.label})")
