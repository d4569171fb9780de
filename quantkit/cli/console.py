"""What every command shares: logging, errors, progress bars and tables. Nothing heavy is imported here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.progress import Progress, above_bars
from quantkit.errors import QuantkitError
from quantkit.wording import printable

if TYPE_CHECKING:
    from quantkit.pipeline.cluster import Cluster
    from quantkit.sources.source import TensorSource

# Help lists the options of every command in these sections, those without one first.
COMMON = "Common options"
COMPUTING = "Computing"
SPLITTING = "Splitting"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="GGUF file (any shard), checkpoint directory, or on the hub: ORG/NAME, ORG/NAME:TYPE for GGUF.",
    ),
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
Force = Annotated[bool, typer.Option("--force", help="Replace output files that exist.")]
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
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        show_default="half of what is free",
        rich_help_panel=COMPUTING,
        help="Memory to take for weights and activations, such as 8GB.",
    ),
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
Remote = Annotated[
    bool,
    typer.Option(
        "--remote", rich_help_panel=COMMON, help="Read a hub model's weights by HTTP as needed; keep none on disk."
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="ADDRESS",
        rich_help_panel=COMMON,
        help="Dask workers to use: tcp://HOST:8786 of a scheduler, or local:N for N processes here.",
    ),
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
    """Set the verbosity: warnings by default, more with `verbose`, only errors with `quiet`."""
    global _quiet
    _quiet = quiet
    handler = _Handler()
    handler.setFormatter(_Formatter())
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    # Of other libraries, only warnings are of interest.
    logging.basicConfig(level=logging.ERROR if quiet else logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("quantkit").setLevel(level)
    # That a first run compiles kernels should be told at any verbosity.
    logging.getLogger("quantkit.compile.kernel").setLevel(level if quiet else min(level, logging.INFO))


class _Handler(logging.Handler):
    """Prints messages on stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(self.format(record))


class _Formatter(logging.Formatter):
    """Puts the level in front of a message, unless it is plain information."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno == logging.INFO:
            return text
        origin = f" {record.name}:" if record.levelno < logging.INFO else ""
        return f"{record.levelname.lower()}:{origin} {text}"


def given(context: typer.Context, name: str) -> bool:
    """Whether the user gave the option that a command calls `name`, rather than leaving its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def note(text: str) -> None:
    """Print a line on stderr, unless --quiet."""
    if not _quiet:
        _say(text)


def _say(text: str) -> None:
    # A closed stderr must not stop the command.
    with suppress(OSError), above_bars():
        print(printable(text), file=sys.stderr, flush=True)


def emit(text: str, data: Any, as_json: bool) -> None:
    """Print a result on stdout: `text`, or `data` with --json."""
    if as_json:
        from quantkit.report.json_data import json_text

        print(json_text(data))
    else:
        print(printable(text))


def emit_piece(text: str) -> None:
    """Print a piece of a result on stdout at once; `emit` prints what follows."""
    print(printable(text), end="", flush=True)


@contextmanager
def byte_progress(total: int, title: str) -> Iterator[Callable[[str, int], None]]:
    """Show progress over `total` bytes: call it with the current tensor and the bytes that are done."""
    with Progress(title, "B", total, hidden=_quiet) as progress:
        yield lambda tensor, nbytes: progress.advance(nbytes, tensor)


@contextmanager
def chunk_progress(title: str, unit: str = "chunk") -> Iterator[Callable[[float, int, str], None]]:
    """Show progress over chunks: call it with the chunks that are done, their total, and the result so far."""
    with Progress(title, unit, hidden=_quiet) as progress:
        yield progress.update


@contextmanager
def measure_progress(
    title: str, form: str = "", unit: str = "chunk"
) -> Iterator[Callable[[float, int, float | None], None]]:
    """Show the progress of a measurement, whose result so far is written as `form`, such as "PPL = {:.4f}"."""
    with Progress(title, unit, hidden=_quiet) as progress:
        yield lambda done, total, value: progress.update(done, total, "" if value is None else form.format(value))


@contextmanager
def work_progress(title: str) -> Iterator[Callable[[float, str], None]]:
    """Show progress of a long run: call it with the share that is done, 0 to 1, and what is being done."""
    from tqdm import tqdm

    hidden = True if _quiet else None
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
    with tqdm(total=1.0, desc=title, disable=hidden, leave=False, bar_format=form) as bar:

        def advance(share: float, what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update(min(1.0, share) - bar.n)

        yield advance


def measured_ahead(
    model: TensorSource, threads: int | None, backend: str = "numpy", comparing: bool = False
) -> AbstractContextManager[None]:
    """On a first run, let helper processes compile the kernels that measuring `model` will need.

    With `comparing`, those for its divergence from another model, else those for its log-likelihoods alone.
    """
    from quantkit.compile.ahead import compiled_ahead
    from quantkit.evaluate.needed_kernels import measuring_kernels
    from quantkit.machine import default_threads

    needed = measuring_kernels(model, (), comparing) if backend == "numpy" else []
    return compiled_ahead(needed, threads or default_threads())


@contextmanager
def joined(address: str | None) -> Iterator[Cluster | None]:
    """The cluster at `address`, None without one."""
    if address is None:
        yield None
        return
    from quantkit.pipeline.cluster import Cluster

    with Cluster(address) as cluster:
        yield cluster


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
    """Split the values of a repeatable option at commas."""
    return [item.strip() for value in values for item in value.split(",") if item.strip()]
