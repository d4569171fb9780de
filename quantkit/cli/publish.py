"""`quantkit publish`: a directory of GGUF files on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Json, Quiet, Verbose, emit, note, setup
from quantkit.errors import QuantkitError


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of GGUF files, card and report.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Model repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to upload to.")] = None,
    collection: Annotated[str | None, typer.Option(metavar="SLUG", help="Collection to add the model to.")] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Message of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded; send nothing.")] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Upload a directory of GGUF files to the hub, and compare sizes and hashes there afterwards.

    Files that are on the hub already are not sent again, so an interrupted upload can be continued. Log in with
    `hf auth login` first.
    """
    setup(verbose, quiet)
    from quantkit.report.lint import ERROR, lint
    from quantkit.report.publish import contents, publish
    from quantkit.report.tables import table
    from quantkit.wording import count_text, size_text

    items = contents(directory)
    problems = [each for each in lint(directory) if each.level == ERROR]
    if problems:
        raise QuantkitError(f"{problems[0].file}: {problems[0].problem}; see `quantkit lint {directory}`")
    total = size_text(sum(item.size for item in items))
    sent = [{"path": item.name, "size": item.size} for item in items]
    data = {"repository": repo, "revision": revision, "files": sent}
    if dry_run:
        place = f"https://huggingface.co/{repo}" + (f"/tree/{revision}" if revision else "")
        listed = table(["file", "size"], [[item.name, size_text(item.size)] for item in items])
        shown = f"{listed}\n{count_text(len(items), 'file')}, {total}, would go to {place}"
        emit(shown, {**data, "url": None}, as_json)
        return
    note(f"uploading {count_text(len(items), 'file')}, {total}, to {repo}")
    address = publish(directory, repo, private=private, revision=revision, collection=collection, message=message)
    emit(f"published {address}", {**data, "url": address}, as_json)
