"""What every command shares: logging, errors, progress bars and tables. Nothing heavy is imported here."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.sources.source import TensorSource

# Help lists the options of every command in these sections, those without one first.
COMMON = "Common options"
COMPUTING = "Computing"
SPLITTING = "Splitting"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="GGUF file (any shard), checkpoint directory, or hub id ORG/NAME.")
]
Text = Annotated[
    str, typer.Option("--text", "--file", "-f", metavar="FILE", help="Text file (UTF-8), or wikitext-2[:SPLIT].")
]
Context = Annotated[
    int, typer.Option("--n-ctx", "--ctx-size", "-c", min=4, metavar="N", help="Context: tokens in a chunk.")
]
Chunks = Annotated[int | None, typer.Option(min=1, metavar="N", show_default="all", help="Chunks to measure.")]
Batch = Annotated[
    int | None, typer.Option(min=1, metavar="N", show_default="by memory", help="Chunks to compute together.")
]
SplitSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", rich_help_panel=SPLITTING, help="Maximum size of a shard, such as 500M or 2G."),
]
SplitTensors = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", rich_help_panel=SPLITTING, help="Maximum tensors in a shard."),
]
Backend = Annotated[
    str,
    typer.Option(metavar="NAME", rich_help_panel=COMPUTING, help="Compute backend: numpy, or torch (quantkit[torch])."),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", rich_help_panel=COMPUTING, help="Device for torch: cpu, cuda or mps.")
]
Precision = Annotated[
    str, typer.Option(metavar="NAME", rich_help_panel=COMPUTING, help="Precision of torch's products: f32 or bf16.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", "-t", min=1, metavar="N", show_default="all", rich_help_panel=COMMON, help="Threads to use."
    ),
]
Pre = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=COMMON, help="Pre-tokenizer, where it is not recognised."),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REV", rich_help_panel=COMMON, help="Branch, tag or commit of a model on the hub."),
]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=COMMON, help="Print the result as JSON.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        show_default=False,
        rich_help_panel=COMMON,
        help="Say what was decided; -vv adds debug messages.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", rich_help_panel=COMMON, help="Print nothing but errors and results.")
]

_quiet = False


def setup(verbose: int = 0, quiet: bool = False) -> None:
    """Set the amount of talk: warnings by default, `verbose` for more, `quiet` for errors alone."""
    global _quiet
    _quiet = quiet
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    _tell("quantkit.compile.kernel", logging.ERROR if quiet else logging.INFO)
    for name in ("numba", "llvmlite", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _tell(name: str, level: int) -> None:
    """Let a logger speak to the user in its own words, without a level in front."""
    logger, handler = logging.getLogger(name), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)


def note(text: str) -> None:
    """A line for the reader, on stderr, unless --quiet."""
    if not _quiet:
        typer.echo(text, err=True)


def emit(text: str, data: Any, as_json: bool) -> None:
    """Print a result on stdout: `text`, or `data` with --json."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False, default=str) if as_json else text)


@contextmanager
def byte_progress(total: int, title: str) -> Iterator[Callable[[str, int], None]]:
    """A progress bar over `total` bytes, with the tensor under way and the remaining time."""
    from tqdm import tqdm

    hidden = True if _quiet else None  # None: hidden unless stderr is a terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=hidden, leave=False) as bar:

        def advance(tensor: str, nbytes: int) -> None:
            bar.set_postfix_str(tensor, refresh=False)
            bar.update(nbytes)

        yield advance


@contextmanager
def chunk_progress(title: str, unit: str = "chunk") -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar over chunks: call it with those done, their number, and a running result."""
    from tqdm import tqdm

    hidden = True if _quiet else None
    with tqdm(unit=unit, desc=title, disable=hidden, leave=False) as bar:

        def advance(done: int, total: int, result: str) -> None:
            bar.total = total
            bar.set_postfix_str(result, refresh=False)
            bar.update(done - bar.n)

        yield advance


def measured_ahead(
    model: TensorSource, threads: int | None, backend: str = "numpy", comparing: bool = False
) -> AbstractContextManager[None]:
    """Let processes beside this one compile what a measurement of `model` will need, on a first run.

    `comparing`: its divergence from another model, else its log-likelihoods alone.
    """
    from quantkit.compile.ahead import compiled_ahead
    from quantkit.evaluate.needed_kernels import measuring_kernels
    from quantkit.machine import default_threads

    needed = measuring_kernels(model, (), comparing) if backend == "numpy" else []
    return compiled_ahead(needed, threads or default_threads())


def read_text(name: str) -> str:
    """The text in the file `name`, or that `name` stands for. Raises QuantkitError when it cannot be read."""
    from quantkit.evaluate.texts import read_named

    try:
        if not Path(name).exists() and (known := read_named(name)) is not None:
            return known
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QuantkitError(f"{name}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise QuantkitError(f"{name}: {error.strerror or error}") from None


def split_list(values: Sequence[str]) -> list[str]:
    """The items of a repeatable option that also takes commas."""
    return [item.strip() for value in values for item in value.split(",") if item.strip()]
