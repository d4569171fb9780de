"""The command `quantkit`: one module per command, loaded when the command runs."""

from __future__ import annotations

import _thread
import importlib
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

import quantkit
from quantkit.cli import streams
from quantkit.cli.console import COMMON
from quantkit.cli.hints import hinted, running
from quantkit.errors import QuantkitError
from quantkit.formats.atomic import remove_temporaries
from quantkit.wording import did_you_mean, printable

# Command -> (module under quantkit.cli, one line for --help). Modules are imported only when their command runs.
COMMANDS = {
    "convert": ("convert", "Convert a Hugging Face checkpoint to a GGUF file."),
    "quantize": ("quantize", "Quantize a checkpoint or a GGUF file."),
    "types": ("types", "List the file types and what each is for."),
    "perplexity": ("perplexity", "Measure perplexity, and divergence from another model."),
    "imatrix": ("imatrix", "Compute, combine and show importance matrices."),
    "tasks": ("tasks", "Score HellaSwag, Winogrande or multiple-choice tasks."),
    "generate": ("generate", "Continue a prompt, with one model or two side by side."),
    "embed": ("embed", "Print the vectors of texts."),
    "report": ("report", "Convert, quantize and measure in one go."),
    "recommend": ("recommend", "Recommend a type for the memory available."),
    "lint": ("lint", "Check GGUF files before publishing them."),
    "export": ("export", "Write the files that Ollama or vLLM need."),
    "publish": ("publish", "Upload GGUF files, card and report to the hub."),
    "split": ("split", "Cut a GGUF file into shards."),
    "merge": ("merge", "Join the shards of a split GGUF model."),
    "dequantize": ("dequantize", "Write a GGUF model's weights as F32, F16 or BF16."),
    "compare": ("compare", "Compare two models: metadata, tensors, errors."),
    "inspect": ("inspect", "Show a model's metadata and tensors."),
    "verify": ("verify", "Check a GGUF file for damage."),
    "hash": ("hash", "Print digests of a model's tensors."),
    "attest": ("attest", "Write or check a statement of a file's origin."),
    "architectures": ("architectures", "List the models that can be converted and evaluated."),
}

# What typer exits with after Ctrl-C, as shells do.
INTERRUPTED = 128 + signal.SIGINT

# Help is as wide as the terminal; without this, typer stops at 80 columns.
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 1000}


class Command(TyperCommand):
    """A command whose help names arguments by their metavars and groups options into sections.

    If an option of the command would help with an error, the message ends with it.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        running(self.params)
        try:
            return super().invoke(ctx)
        except QuantkitError as problem:
            raise QuantkitError(hinted(problem)) from None

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The arguments in the usage line."""
        arguments = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        names = [param.metavar or param.name.upper() for param in arguments]
        pieces = [
            name if param.required or name.startswith("[") else f"[{name}]"
            for param, name in zip(arguments, names, strict=True)
        ]
        return ["[OPTIONS]", *pieces]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, and the options section by section."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                sections["Arguments"].append((param.metavar or param.name.upper(), record[1]))
            else:
                usual = COMMON if param.name == "help" else "Options"
                section = getattr(param, "rich_help_panel", None) or usual
                sections.setdefault(section, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class LazyGroup(TyperGroup):
    """A command group that lists its commands without importing them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands, in the order in which a user needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command; for the group's help and completion, return a placeholder with its summary."""
        if cmd_name not in COMMANDS:
            return None
        module, summary = COMMANDS[cmd_name]
        # Shells ask for completions with the command line in the environment.
        words = [*sys.argv[1:], *os.environ.get("COMP_WORDS", os.environ.get("_TYPER_COMPLETE_ARGS", "")).split()]
        if cmd_name not in words:
            return TyperCommand(cmd_name, help=summary, short_help=summary)
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        command = importlib.import_module(f"quantkit.cli.{module}").command
        app.command(cmd_name, cls=Command, context_settings=_CONTEXT)(command)
        return typer.main.get_command(app)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that `args` begin with; an unknown one is an error that suggests the nearest."""
        if args and args[0] not in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}. {did_you_mean(args[0], COMMANDS).capitalize()}".rstrip())
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=LazyGroup,
    name="quantkit",
    context_settings=_CONTEXT,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantkit {quantkit.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Quantize models to GGUF, byte for byte as llama-quantize does, and measure what it costs."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 fine, 1 a problem with the input or the machine, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """
    streams.prepare()
    lost = _LostInterrupts()
    sys.unraisablehook = lost.heed
    ended = _Ended()
    try:
        _run()
    except BaseException as ending:
        if ended or lost or (isinstance(ending, SystemExit) and ending.code == INTERRUPTED):
            # Outputs and helper processes are cleaned up, but a thread may still be compiling a kernel for seconds.
            remove_temporaries()
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(ended.code)
        raise


class _Ended:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does, so that it cleans up.

    True once one came; `code` is what to exit with, that of Ctrl-C without one. A signal that is
    ignored from the start, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.code, self._any = INTERRUPTED, False
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, self._end)

    def __bool__(self) -> bool:
        return self._any

    def _end(self, number: int, frame: Any) -> None:
        if not self._any:  # a second one must not interrupt the cleanup
            self._any, self.code = True, 128 + number
            raise KeyboardInterrupt


def _run() -> None:
    try:
        try:
            app(prog_name="quantkit")
        finally:
            streams.flush()
    except QuantkitError as problem:
        fail(str(problem))
    except MemoryError:
        fail(hinted(QuantkitError("out of memory", option="threads")))
    except OSError as problem:
        name = f"{problem.filename}: " if problem.filename else ""
        fail(f"{name}{problem.strerror or problem}")


class _LostInterrupts:
    """Repeats a Ctrl-C that arrived where nothing can be raised, such as in a callback of numba's compiler.

    True once that happened. The compiler may fail for it in the meantime.
    """

    def __init__(self) -> None:
        self._any = False

    def __bool__(self) -> bool:
        return self._any

    def heed(self, lost: Any) -> None:
        """Handle what could not be raised: the process's sys.unraisablehook."""
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(lost)
            return
        self._any = True
        again = threading.Timer(0.05, _thread.interrupt_main)
        again.daemon = True
        again.start()


def fail(problem: str) -> None:
    """Print one line on stderr and exit with 1."""
    with suppress(OSError):
        print(printable(f"error: {' '.join(problem.split())}"), file=sys.stderr, flush=True)
    sys.exit(1)
