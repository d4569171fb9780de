"""`quantkit architectures`: which models can be converted and evaluated."""

from __future__ import annotations

from quantkit.cli.console import Json, Quiet, Verbose, emit, setup


def command(as_json: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """List the architectures that quantkit converts, by their transformers classes, and which of them it evaluates.

    Below are the multimodal classes whose projectors it converts.
    """
    setup(verbose, quiet)
    from quantkit.architectures import supported
    from quantkit.architectures.projectors import classes
    from quantkit.report.tables import table

    rows = supported()
    text = table(
        ["family", "general.architecture", "transformers classes", "evaluated", "notes"],
        [
            [row.family, row.gguf_name, ", ".join(row.classes), "yes" if row.evaluated else "no", row.notes]
            for row in rows
        ],
        left=5,
    )
    multimodal = classes()
    text += f"\n\nProjectors (`convert --mmproj`): {', '.join(multimodal)}."
    emit(text, {"architectures": rows, "projectors": multimodal}, as_json)
