"""Checkpoints by name: a local directory, or a model on the Hugging Face hub, downloaded into its cache."""

from __future__ import annotations

import fnmatch
import glob
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.sources.packed import OTHER_FILES

# Download only what conversion reads: a repository often holds the same weights in several formats.
FILES = (
    "config.json",
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "rwkv_vocab*.txt",
    "merges.txt",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "README.md",
    "model*.safetensors",
    "model.safetensors.index.json",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*_Pooling/config.json",
    *OTHER_FILES,
)
# A GGUF file on the hub, by its type or its name, and files that are no models.
_GGUF = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+):(?P<file>[\w-][\w.-]*(?:/[\w-][\w.-]*)*)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# An error says so here.
logging.getLogger("huggingface_hub._snapshot_download").addFilter(lambda record: "No files" not in record.getMessage())
_NO_MODEL = ("*mmproj*", "*imatrix*")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(
    checkpoint: str, revision: str | None = None, patterns: Sequence[str] = FILES, needed: str = "config.json"
) -> Path:
    """The directory of `checkpoint`: a local one, or a hub id `org/name`, downloaded once and cached.

    Of a repository only the files that `patterns` name are downloaded, of which `needed` must be one. `revision` is a
    branch, tag or commit of the hub's repository. huggingface_hub's own environment variables apply (HF_HOME, HF_TOKEN,
    HF_ENDPOINT, HF_HUB_OFFLINE). Raises QuantkitError when there is no such directory or repository, when access to it
    is restricted, and when it is neither cached nor reachable.
    """
    try:
        path = Path(checkpoint).expanduser()
    except RuntimeError:
        raise QuantkitError(f"{checkpoint}: there is no such user") from None
    if checkpoint and path.is_dir():
        if revision is not None:
            raise QuantkitError(f"{checkpoint}: a revision applies to a hub id, and this is a local directory")
        return path
    if path.is_file():
        raise QuantkitError(f"{checkpoint}: a file; a checkpoint is the directory with config.json and *.safetensors")
    if not _REPO_ID.fullmatch(checkpoint):
        raise QuantkitError(f"{checkpoint}: no such directory, and not a hub id like org/name")
    return download(checkpoint, revision, patterns, needed)


def gguf_of(name: str, revision: str | None = None) -> Path | None:
    """The GGUF file that `org/name:TYPE` or `org/name:FILE.gguf` names on the hub, downloaded once and cached.

    None for names of another form. Of a type, only that file, or all shards of that model, are fetched. Raises
    QuantkitError as `resolve`, and where there is none or more than one.
    """
    if (match := _GGUF.fullmatch(name)) is None:
        return None
    from huggingface_hub import snapshot_download

    repo_id, wanted = match["repo"], match["file"]
    patterns = _gguf_patterns(wanted)
    with hub_errors(repo_id, revision):
        directory = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=list(_NO_MODEL))
        )
    found = [
        path
        for path in sorted(directory.rglob("*.gguf"))
        if _matches(path.relative_to(directory).as_posix(), patterns)
        and not _matches(path.relative_to(directory).as_posix(), _NO_MODEL)
        and not (_SHARD.search(path.name) and "-00001-of-" not in path.name)
    ]
    at = _at(repo_id, revision)
    if not found:
        raise QuantkitError(f"{at}: it holds no GGUF file of the type or name {wanted!r}")
    if len(found) > 1:
        names = ", ".join(path.relative_to(directory).as_posix() for path in found[:4])
        raise QuantkitError(f"{at}: several GGUF files are {wanted}: {names}; name one: {repo_id}:FILE.gguf")
    return found[0]


def _gguf_patterns(wanted: str) -> list[str]:
    """Patterns of the files that `wanted` means: a file, or a type, which ends names or is a folder's."""
    if wanted.lower().endswith(".gguf"):
        return [glob.escape(wanted)]
    letters = "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in wanted)
    ends = [f"{letters}.gguf", f"{letters}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].gguf"]
    return [f"{before}{end}" for end in ends for before in ("", "*[-._/]")] + [
        f"{letters}/*.gguf",
        f"*/{letters}/*.gguf",
    ]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_hub_id(name: str) -> bool:
    """Whether `name` looks like a hub id, and is no local directory."""
    return _REPO_ID.fullmatch(name) is not None and not Path(name).is_dir()


def download(repo_id: str, revision: str | None, patterns: Sequence[str] = FILES, needed: str = "config.json") -> Path:
    """The directory of the hub's cache with the files of a repository that `patterns` name. See `resolve`."""
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id, revision):
        directory = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    if not (directory / needed).is_file():
        kind = "a transformers checkpoint" if needed == "config.json" else "an adapter of PEFT"
        raise QuantkitError(
            f"{_at(repo_id, revision)}: it has no {needed}, so it is not {kind}; a GGUF file "
            f"there is named by its type, like {repo_id}:Q8_0"
        )
    return directory


def _at(repo_id: str, revision: str | None) -> str:
    return repo_id if revision is None else f"{repo_id} at revision {revision}"


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Convert errors of huggingface_hub to QuantkitErrors that say what to do."""
    from huggingface_hub import errors

    at = _at(repo_id, revision)
    try:
        yield
    except errors.GatedRepoError:
        raise QuantkitError(f"{repo_id}: gated: accept its terms on the hub, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise QuantkitError(
            f"{repo_id}: no such directory, and no such public model on the hub; a private one needs `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise QuantkitError(f"{repo_id}: the hub has no revision {revision!r} of it") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise QuantkitError(f"{at}: no such directory, not in the hub's cache, and the hub cannot be reached") from None
    except errors.HFValidationError as error:
        raise QuantkitError(f"{repo_id}: not a hub id: {_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise QuantkitError(f"{at}: the hub refused: {_line(error)}") from None
    except OSError as error:
        raise QuantkitError(f"{at}: the download failed: {_line(error)}") from None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def repo_id_of(directory: Path) -> str | None:
    """The hub id that `directory` is a cached snapshot of, or None when it is an ordinary directory."""
    snapshots, repository = directory.parent, directory.parent.parent.name
    if snapshots.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return None
