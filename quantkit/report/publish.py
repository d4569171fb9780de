"""Uploading a directory of GGUF files to the Hugging Face hub with huggingface_hub, and checking the result."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantkitError

# What belongs in a repository of GGUF files; other files in the directory are not uploaded.
_PATTERNS = ("*.gguf", "README.md", "report.html", "report.json", "report.md", "params", "system", "template",
             "config.json", "generation_config.json", "tokenizer*", "Modelfile*", "*.intoto.json",
             "LICENSE*")  # fmt: skip
_READ = 1 << 20


@dataclass(frozen=True)
class Item:
    """A file to publish: its path, its name in the repository, and its size in bytes."""

    path: Path
    name: str
    size: int


def contents(directory: Path) -> list[Item]:
    """The files of `directory` to publish, by name. Raises QuantkitError when there is no GGUF file in it."""
    if not directory.is_dir():
        raise QuantkitError(f"{directory}: is not a directory; name the one that holds the files to publish")
    found = {}
    for pattern in _PATTERNS:
        for path in directory.rglob(pattern):
            name = path.relative_to(directory)
            hidden = any(part.startswith(".") for part in name.parts)
            if path.is_file() and not path.is_symlink() and not hidden:
                found[name.as_posix()] = Item(path, name.as_posix(), path.stat().st_size)
    if not any(name.endswith(".gguf") for name in found):
        raise QuantkitError(f"{directory}: holds no GGUF files to publish")
    return [found[name] for name in sorted(found)]


def publish(
    directory: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    collection: str | None = None,
    message: str | None = None,
) -> str:
    """Upload the contents of `directory` to the model repository `repo` (ORG/NAME), and compare what arrived.

    The repository and the branch `revision` are created if they do not exist. Files that the hub has already are not
    sent again, so an interrupted upload can be continued. `collection` is the slug of a collection to add the model to.
    Returns the address of the repository. Raises QuantkitError when the hub refuses, or holds something else after.
    """
    from huggingface_hub import HfApi, errors

    items = contents(directory)
    api = HfApi()
    try:
        address = str(api.create_repo(repo, repo_type="model", private=private, exist_ok=True))
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            revision=revision,
            allow_patterns=[item.name for item in items],
            commit_message=message or "Upload GGUF files with quantkit",
        )
        if collection is not None:
            api.add_collection_item(collection, repo, "model", exists_ok=True)
        problems = _differences(api, repo, revision, items)
    except errors.HFValidationError as error:
        raise QuantkitError(f"{repo}: {_first_line(error)}") from None
    except Exception as error:  # the client passes on what its HTTP library raises, or wraps it in a RuntimeError
        refusal = error if error.__cause__ is None else error.__cause__
        what = "the hub refused" if isinstance(refusal, errors.HfHubHTTPError) else "the upload failed"
        raise QuantkitError(f"{repo}: {what}: {_first_line(refusal)}; run it again to continue") from None
    if problems:
        raise QuantkitError(f"{repo}: after the upload, {'; '.join(problems)}")
    return address


def _differences(api: object, repo: str, revision: str | None, items: Sequence[Item]) -> list[str]:
    """The differences between the repository's sizes and hashes and those of the files."""
    remote = {
        info.path: info
        for at in range(0, len(items), 100)
        for info in api.get_paths_info(repo, [item.name for item in items[at : at + 100]], revision=revision)  # type: ignore[attr-defined]
    }
    problems = []
    for item in items:
        info = remote.get(item.name)
        if info is None:
            problems.append(f"{item.name} is missing")
        elif info.size != item.size:
            problems.append(f"{item.name} has {info.size} bytes there, not {item.size}")
        else:
            ours = sha256(item.path) if info.lfs is not None else git_blob(item.path)
            theirs = info.lfs.sha256 if info.lfs is not None else info.blob_id
            if ours != theirs:
                problems.append(f"{item.name} has another hash there")
    return problems


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return _digest(path, hashlib.sha256())


def git_blob(path: Path) -> str:
    """The name that git gives to a file's bytes: how the hub identifies small files."""
    return _digest(path, hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False))


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with open(path, "rb") as file:
        while data := file.read(_READ):
            digest.update(data)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
