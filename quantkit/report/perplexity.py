"""A perplexity as text, and what measuring took."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.evaluate.divergence import DivergenceResult
    from quantkit.evaluate.perplexity import PerplexityResult


def cost_text(result: PerplexityResult | DivergenceResult) -> str:
    """What was measured over, how fast, and in how much memory."""
    r = result
    memory = "" if r.memory is None else f", at most {r.memory / 1e9:.2f} GB"
    return (
        f"{r.n_chunks} chunks of {r.n_ctx} tokens, {r.n_tokens} tokens scored, {r.seconds:.1f} s, "
        f"{r.tokens_per_second:.0f} tokens/s, {r.batch} chunks at a time{memory}"
    )


def perplexity_text(result: PerplexityResult) -> str:
    """`result` for a reader, in llama-perplexity's form."""
    return f"PPL = {result.ppl:.4f} ± {result.error:.5f}\n{cost_text(result)} ({result.backend}, {result.precision})"
