"""What carries out a forward pass: numpy by default, or torch, behind one interface."""

from __future__ import annotations

import logging
import os

from quantkit.errors import QuantkitError
from quantkit.evaluate.model import Model
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.machine import CORE_TYPE, Processor
from quantkit.sources.source import TensorSource, open_model
from quantkit.wording import count_text

log = logging.getLogger(__name__)

# What measurements take as a model: one that is loaded, a source, or the path or hub id of one.
AnyModel = Model | TensorSource | str | os.PathLike[str]


def load(model: AnyModel, compute: Compute | None = None, keep: bool | None = None) -> Model:
    """`model`, a source or the path of one, ready to run as `compute` says; a model that is loaded already, as it is.

    `keep` says whether its decoded weights stay in memory after their layer, otherwise its size does. Raises
    QuantkitError where torch or the device is missing, for models that cannot be run, and for a loaded model together
    with `compute`, which would change nothing.
    """
    if isinstance(model, Model):
        if compute is not None:
            raise QuantkitError(f"{model.source.label}: is loaded already and cannot be told again how to compute")
        return model
    source = open_model(model) if isinstance(model, (str, os.PathLike)) else model
    compute = compute or Compute()
    loaded: Model
    if compute.backend == "torch":
        from quantkit.evaluate.torch_backend import TorchTransformer

        loaded = TorchTransformer(source, compute, keep is not False)
    else:
        loaded = Transformer(source, compute, keep)
        _suggest_kernels(loaded.blas)
    log.info(
        "%s: backend %s, %s, %s, matrix products by %s",
        source.label, loaded.backend, loaded.precision, count_text(loaded.threads.count, "thread"), loaded.blas,
    )  # fmt: skip
    return loaded


def _suggest_kernels(blas: str) -> None:
    processor = Processor.here()
    wanted = None if processor is None else processor.openblas_kernels()
    if wanted is not None and blas == "OpenBLAS Haswell" and CORE_TYPE not in os.environ:
        log.info(
            "numpy was loaded before quantkit, and multiplies matrices without AVX-512, at half the speed: "
            "import quantkit first, or set %s=%s",
            CORE_TYPE, wanted,
        )  # fmt: skip
