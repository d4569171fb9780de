"""`quantkit generate`: text from a model, or from two side by side."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.console import (
    Json,
    Model,
    Pre,
    Quiet,
    Revision,
    Threads,
    Verbose,
    chunk_progress,
    emit,
    emit_piece,
    measured_ahead,
    setup,
)

if TYPE_CHECKING:
    from quantkit.evaluate.generate import Generation
    from quantkit.sources.source import TensorSource


def command(
    source: Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; with --chat a user's message.")
    ],
    model2: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model, shown side by side with the first.")
    ] = None,
    n_tokens: Annotated[
        int, typer.Option("--n-predict", "-n", min=1, metavar="N", help="Maximum number of tokens to generate.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temp", min=0, metavar="X", help="Temperature; 0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, metavar="X", help="Sample from the likeliest tokens with this total probability."),
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Random seed.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message, with --chat.")] = None,
    pre: Pre = None,
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt with a model; with --model2, with two models side by side.

    By default the likeliest token is taken each time, so differences in the output come from the models alone.
    """
    setup(verbose, quiet)
    from quantkit.sources.source import open_model

    models = [open_model(source, revision=revision, pre=pre)]
    if model2 is not None:
        models.append(open_model(model2, pre=pre))
    streamed = len(models) == 1 and not as_json
    results = [
        _generate(
            model,
            threads,
            streamed,
            prompt=prompt,
            n_tokens=n_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            chat=chat,
            system=system,
        )
        for model in models
    ]
    names = [model.label for model in models]
    data = []
    for name, result in zip(names, results, strict=True):
        fields = asdict(result)
        data.append({"model": name, "output": fields.pop("text"), **fields})
    shown = "" if streamed or as_json else _beside(names, [result.text for result in results])
    emit(shown, {"prompt": prompt, "results": data}, as_json)


def _generate(model: TensorSource, threads: int | None, streamed: bool, **settings: Any) -> Generation:
    """Generate text, with a progress bar; if the text is `streamed`, the bar ends when it begins."""
    from quantkit.evaluate.generate import generate
    from quantkit.evaluate.settings import Compute

    with measured_ahead(model, threads), ExitStack() as until_text:
        bar = until_text.enter_context(chunk_progress("generate", "token"))

        def stream(piece: str) -> None:
            until_text.close()
            emit_piece(piece)

        return generate(
            model,
            compute=Compute(threads=threads),
            progress=lambda done, total, speed: bar(done, total, f"{speed:.1f} tokens/s"),
            stream=stream if streamed else None,
            **settings,
        )


def _beside(names: list[str], texts: list[str]) -> str:
    """Format texts side by side, as wide as the terminal allows, and say where they diverge."""
    from io import StringIO

    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    table = Table(*map(escape, names), expand=True, box=MARKDOWN)
    table.add_row(*(Text(text) for text in texts))
    out = Console(file=StringIO(), width=Console().width, color_system=None)
    out.print(table)
    parted = "The outputs are the same." if texts[0] == texts[1] else f"The outputs diverge after {same} characters."
    assert isinstance(out.file, StringIO)
    return f"{out.file.getvalue().strip()}\n\n{parted}"
