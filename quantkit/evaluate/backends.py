"""What carries out a forward pass: numpy by default, or torch, behind one interface."""

from __future__ import annotations

import os

from quantkit.errors import QuantkitError
from quantkit.evaluate.model import Model
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.sources.source import TensorSource, open_source

# What measurements take as a model: one that is loaded, a source, or the path or hub id of one.
AnyModel = Model | TensorSource | str | os.PathLike[str]


def load(model: AnyModel, compute: Compute | None = None) -> Model:
    """`model`, a source or the path of one, ready to run as `compute` says; a model that is loaded already, as it is.

    Raises QuantkitError where torch or the device is missing, for models that cannot be run, and for a loaded model
    together with `compute`, which would change nothing.
    """
    if isinstance(model, Model):
        if compute is not None:
            raise QuantkitError(f"{model.source.label}: is loaded already and cannot be told again how to compute")
        return model
    source = open_source(model) if isinstance(model, (str, os.PathLike)) else model
    compute = compute or Compute()
    if compute.backend == "torch":
        from quantkit.evaluate.torch_backend import TorchTransformer

        return TorchTransformer(source, compute)
    return Transformer(source, compute)
