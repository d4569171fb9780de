"""Which type each tensor becomes, against `llama-quantize --dry-run`, for every file type and every odd shape."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import requires_reference
from make_shapes import SHAPES, make_shape
from support.llama_reference import llama_plan

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.pipeline.mixtures import FILE_TYPES, file_type
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import Plan, plan_quantize
from quantkit.sources.source import GGUFSource


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GGUFSource:
    return GGUFSource(make_shape(request.param, tmp_path_factory.mktemp("shapes")))


def types_of(plan: Plan) -> dict[str, str]:
    return {t.info.name: "" if t.is_copy else t.info.type.name for t in plan}


def assert_same_plan(source: GGUFSource, name: str, **options: bool | GGMLType) -> None:
    theirs_named = {{"leave_output_tensor": "quantize_output_tensor"}.get(k, k): v for k, v in options.items()}
    if "leave_output_tensor" in options:
        theirs_named["quantize_output_tensor"] = not options["leave_output_tensor"]
    code, theirs = llama_plan(source.path, name, **theirs_named)
    if code:
        with pytest.raises(QuantkitError):
            plan_quantize(source, file_type(name), QuantizeOptions(**options))  # type: ignore[arg-type]
        return
    plan = plan_quantize(source, file_type(name), QuantizeOptions(**options))  # type: ignore[arg-type]
    assert list(types_of(plan).items()) == list(theirs.items()), name


@requires_reference
@pytest.mark.parametrize("name", [*FILE_TYPES, "COPY"])
def test_every_file_type(source: GGUFSource, name: str) -> None:
    assert_same_plan(source, name)


@requires_reference
@pytest.mark.parametrize("name", ["Q4_K_M", "Q2_K", "IQ2_M", "IQ3_XXS", "IQ1_S", "Q8_0", "MXFP4_MOE", "F16"])
def test_options(source: GGUFSource, name: str) -> None:
    assert_same_plan(source, name, pure=True)
    assert_same_plan(source, name, leave_output_tensor=True)
    assert_same_plan(source, name, output_tensor_type=GGMLType.Q8_0)
    assert_same_plan(source, name, token_embedding_type=GGMLType.Q8_0)


def test_types_that_need_weights_say_so(source: GGUFSource, tmp_path: Path) -> None:
    plan = plan_quantize(source, file_type("IQ2_XXS"))
    if any(t.needs_weights for t in plan):
        with pytest.raises(QuantkitError, match=r"needs an importance matrix: 'blk.*unusable without one"):
            plan.check()
    else:
        assert "odd" in source.label  # only fallback types there
