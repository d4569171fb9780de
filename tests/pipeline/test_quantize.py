"""Plans and their execution: several outputs, damaged weights, bad requests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import TINYLM
from support.conversion import convert

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import GGUFFile, TensorInfo, ValueType
from quantkit.formats.output import GGUFOutput
from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import FILE_TYPES, file_type
from quantkit.pipeline.naming import Destination, home_of, output_paths
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import plan_quantize
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource

MAIN_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "F16", "BF16", "F32"]
MAIN_TYPES += ["Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture checkpoint as a GGUF file, by `--outtype auto`."""
    return convert(TINYLM, tmp_path_factory.mktemp("converted") / "tinylm-BF16.gguf")


def test_checkpoint_and_its_conversion_give_the_same_files(converted: Path, tmp_path: Path) -> None:
    for label, source in (("direct", CheckpointSource(TINYLM)), ("gguf", GGUFSource(converted))):
        outputs = [(plan_quantize(source, file_type(name)), tmp_path / f"{label}-{name}") for name in MAIN_TYPES]
        execute(source, outputs)
    for name in MAIN_TYPES:
        assert (tmp_path / f"direct-{name}").read_bytes() == (tmp_path / f"gguf-{name}").read_bytes(), name


def test_one_reading_writes_what_single_runs_write(converted: Path, tmp_path: Path) -> None:
    source = GGUFSource(converted)
    names = ("Q4_K_M", "Q8_0", "Q6_K")
    execute(source, [(plan_quantize(source, file_type(name)), tmp_path / name) for name in names], threads=3)
    for name in names:
        alone = tmp_path / f"alone-{name}"
        execute(source, [(plan_quantize(source, file_type(name)), alone)], threads=1, max_buffer_size=1 << 16)
        assert alone.read_bytes() == (tmp_path / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", ["COPY", "Q8_0"])
def test_buffers_are_bounded_for_copies_too(converted: Path, tmp_path: Path, name: str) -> None:
    """Pieces under way, three for each thread, take no more than what was asked for."""

    class Watched(GGUFSource):
        largest = 0

        def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
            rows = super().read(name, start, stop)
            self.largest = max(self.largest, rows.nbytes)
            return rows

    threads, bound = 2, 1 << 18
    for size in (None, bound):
        source = Watched(converted)
        execute(source, [(plan_quantize(source, name), tmp_path / str(size))], threads=threads, max_buffer_size=size)
        assert (3 * threads * source.largest <= bound) == (size == bound)
    assert (tmp_path / "None").read_bytes() == (tmp_path / str(bound)).read_bytes()


def test_every_tensor_is_within_half_a_step(converted: Path, tmp_path: Path) -> None:
    source = GGUFSource(converted)
    path = tmp_path / "q8.gguf"
    execute(source, [(plan_quantize(source, file_type("Q8_0")), path)])
    file = GGUFFile(path)
    for name, info in file.tensors.items():
        before = blocks.decode(source.read(name), source.tensors[name].type)
        after = blocks.decode(file.read(name), info.type)
        if info.type == GGMLType.Q8_0:
            groups = np.abs(before).reshape(-1, 32).max(axis=1, keepdims=True)
            # Half a step, and what rounding the scale to float16 moves 127 steps by.
            bound = groups / 127 * (0.5 + 127 * 2.0**-11)
            assert (np.abs(before - after).reshape(-1, 32) <= bound * 1.001 + 1e-30).all()
        else:
            np.testing.assert_array_equal(before, after)


def write_model(path: Path, values: np.ndarray, name: str = "blk.0.ffn_down.weight") -> Path:
    from quantkit.formats.gguf import Metadata

    metadata = Metadata()
    metadata.set("general.architecture", ValueType.STRING, "llama")
    metadata.set("llama.block_count", ValueType.UINT32, 1)
    rows = values.astype(np.float32).reshape(values.shape[0], -1)
    with GGUFOutput(path, metadata, [TensorInfo(name, rows.shape[::-1], GGMLType.F32)]) as output:
        output.write(rows.view(np.uint8))
    return path


@pytest.mark.parametrize(("value", "word"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "F16", "F32"])
def test_nonfinite_weights_are_named(tmp_path: Path, value: float, word: str, kind: str) -> None:
    values = np.ones((700, 256))
    values[611, 37] = value
    source = GGUFSource(write_model(tmp_path / "bad.gguf", values))
    out = tmp_path / "out.gguf"
    message = rf"bad.gguf: tensor 'blk.0.ffn_down.weight' holds {word} at row 611, column 37; the checkpoint is damaged"
    with pytest.raises(QuantkitError, match=message) as problem:
        execute(source, [(plan_quantize(source, file_type(kind)), out)])
    assert problem.value.option == "allow_nonfinite"
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]
    execute(source, [(plan_quantize(source, file_type(kind)), out)], allow_nonfinite=True)
    assert out.exists()


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q8_0", "Q4_K_S"])
def test_weights_beyond_a_types_range(tmp_path: Path, kind: str) -> None:
    """float16 ends at 65504: a larger weight, or a block whose scale would be larger, is refused by name."""
    source = GGUFSource(write_model(tmp_path / "huge.gguf", np.full((2, 256), -1e30)))
    with pytest.raises(QuantkitError, match=r"'blk.0.ffn_down.weight' holds weights too large for"):
        execute(source, [(plan_quantize(source, file_type(kind)), tmp_path / "out.gguf")])
    assert not (tmp_path / "out.gguf").exists()


def test_requantizing_is_refused_with_the_reason(converted: Path, tmp_path: Path) -> None:
    source, q8 = GGUFSource(converted), tmp_path / "q8.gguf"
    execute(source, [(plan_quantize(source, file_type("Q8_0")), q8)])
    again = GGUFSource(q8)
    with pytest.raises(QuantkitError, match="is Q8_0 already") as problem:
        plan_quantize(again, file_type("Q4_K_M"))
    assert problem.value.option == "allow_requantize"
    assert plan_quantize(again, file_type("Q8_0")).nbytes  # nothing to do is no error
    assert plan_quantize(again, file_type("Q4_K_M"), QuantizeOptions(allow_requantize=True)).nbytes


def test_the_input_is_never_the_output(converted: Path) -> None:
    source = GGUFSource(converted)
    with pytest.raises(QuantkitError, match="is the input"):
        execute(source, [(plan_quantize(source, file_type("Q8_0")), converted)])


def test_plans_can_be_edited_and_printed(converted: Path, tmp_path: Path) -> None:
    source = GGUFSource(converted)
    plan = plan_quantize(source, file_type("q4_k"))
    plan.set_type("blk.0.attn_q.weight", "Q8_0")
    with pytest.raises(QuantkitError, match="no tensor 'nope'"):
        plan.set_type("nope", "Q8_0")
    path = tmp_path / "edited.gguf"
    execute(source, [(plan, path)])
    file = GGUFFile(path)
    assert file.tensors["blk.0.attn_q.weight"].type == GGMLType.Q8_0
    assert path.stat().st_size == plan.file_size
    assert "blk.0.attn_q.weight" in str(plan) and f"{plan.bits_per_weight:.2f} bits per weight" in str(plan)


def test_pure_and_names(converted: Path) -> None:
    source = GGUFSource(converted)
    kinds = {t.info.type for t in plan_quantize(source, file_type("Q4_K_M"), QuantizeOptions(pure=True))}
    assert kinds == {GGMLType.F32, GGMLType.Q4_K}
    with pytest.raises(QuantkitError, match=r"unknown file type 'Q9'.*Q4_K_M"):
        file_type("Q9")
    assert file_type("q5_k") is FILE_TYPES["Q5_K_M"]


def test_output_names(converted: Path, tmp_path: Path) -> None:
    source, home = GGUFSource(converted), converted.parent

    def paths(types: list[str], output: str | Path | None) -> list[Path]:
        return output_paths(Destination.of(output, home_of(converted)), source, types)

    assert paths(["Q4_0"], None) == [home / "tinylm-Q4_0.gguf"]
    assert paths(["Q4_0"], tmp_path / "x.gguf") == [tmp_path / "x.gguf"]
    assert paths(["Q4_0"], tmp_path / "x") == [tmp_path / "x"]
    two = [tmp_path / "tinylm-Q4_0.gguf", tmp_path / "tinylm-Q8_0.gguf"]
    assert paths(["Q4_0", "Q8_0"], tmp_path) == two
    assert paths(["Q4_0"], f"{tmp_path}/new.gguf/") == [tmp_path / "new.gguf" / "tinylm-Q4_0.gguf"]
    for name in ("x.gguf", "new"):
        with pytest.raises(QuantkitError, match="one file for 2 types; name a directory"):
            paths(["Q4_0", "Q8_0"], tmp_path / name)
    with pytest.raises(QuantkitError, match="twice"):
        paths(["Q4_0", "Q4_0"], None)
    with pytest.raises(QuantkitError, match="no file type"):
        paths([], None)
    with pytest.raises(QuantkitError, match="empty"):
        paths(["Q4_0"], "")
    assert list(tmp_path.iterdir()) == []
