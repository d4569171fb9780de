"""What no backend computes: such models and descriptions are refused in one line."""

from __future__ import annotations

from quantkit.architectures.forward import MAX_HEAD, ForwardSpec
from quantkit.errors import QuantkitError
from quantkit.evaluate.layers import unsupported
from quantkit.evaluate.streams import unsupported as unsupported_streams


def require_predictions(spec: ForwardSpec, label: str, what: str) -> None:
    """Raise QuantkitError for a model that predicts no tokens; `what` goes by predictions."""
    if not spec.causal or spec.head is not None:
        kind = "a reranker" if spec.causal else "an encoder"
        raise QuantkitError(f"{label}: {what} goes by what a model predicts, and {kind} ({spec.architecture}) does not")


def refuse_encoder(spec: ForwardSpec, label: str) -> None:
    """Raise QuantkitError for a model that does not predict what comes next."""
    if not spec.causal:
        raise QuantkitError(
            f"{label}: an encoder ({spec.architecture}): its tokens see those after them, so it predicts none, and has "
            "no perplexity; compare the vectors that it gives texts instead"
        )
    if spec.head is not None:
        raise QuantkitError(
            f"{label}: a reranker ({spec.architecture}): it gives texts scores, predicts no token, and has no "
            "perplexity; compare the scores that it gives texts instead"
        )


def refuse_unsupported(spec: ForwardSpec, label: str) -> None:
    """Raise QuantkitError for what no backend computes, and for sizes that cannot be."""
    for layer in spec.layers:
        for mixer in layer.mixers:
            if min(mixer.sizes) < 1 or max(mixer.sizes) > MAX_HEAD:
                listed = ", ".join(map(str, mixer.sizes))
                raise QuantkitError(f"{label}: impossible sizes of {type(mixer).__name__}: {listed}")
        if layer.feed_forward is not None and layer.feed_forward.n_ff < 1:
            raise QuantkitError(f"{label}: impossible sizes: {layer.feed_forward.n_ff} in the feed-forward block")
        for what in unsupported(layer):
            raise QuantkitError(f"{label}: the forward pass does not know {what}")
    if (impossible := unsupported_streams(spec.streams)) is not None:
        raise QuantkitError(f"{label}: a model of {impossible}")
    if spec.logit_softcap is not None and not spec.logit_softcap > 0:
        raise QuantkitError(f"{label}: logits capped at {spec.logit_softcap}")
