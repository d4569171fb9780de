"""Texts by name: WikiText-2, fetched once from the Hugging Face hub into its cache."""

from __future__ import annotations

import hashlib
import zipfile
from logging import ERROR
from pathlib import Path

import numpy as np

from quantkit.errors import QuantkitError

DEFAULT = "wikitext-2"
CALIBRATION = "wikitext-2:train"
_REPO, _FILE = "ggml-org/ci", "wikitext-2-raw-v1.zip"
_SPLITS = ("test", "valid", "train")
# The largest split, train, has 11 MB.
_LARGEST = 64 << 20


def read_named(name: str) -> str | None:
    """The text that `name` stands for: `wikitext-2` (its test split) or `wikitext-2:SPLIT`; None for other names.

    huggingface_hub's own environment variables apply (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE). Raises QuantkitError for
    an unknown split, and when the text is neither cached nor to be had.
    """
    title, _, split = name.partition(":")
    if title != DEFAULT:
        return None
    split = split or "test"
    if split not in _SPLITS:
        raise QuantkitError(f"{name}: WikiText-2 has no split {split!r}: choose {', '.join(_SPLITS)}")
    archive = _download()
    member = f"wikitext-2-raw/wiki.{split}.raw"
    try:
        with zipfile.ZipFile(archive) as file:
            if file.getinfo(member).file_size > _LARGEST:
                raise QuantkitError(f"{archive}: {member} is too large to be WikiText-2")
            return file.read(member).decode("utf-8")
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError, EOFError):
        raise QuantkitError(f"{archive}: damaged: no readable {member}; remove it, to download it again") from None


def text_sha256(text: str | np.ndarray) -> str:
    """What identifies `text`, a string or token ids: the digest of its UTF-8, or of int32 ids, in hexadecimal."""
    if isinstance(text, str):
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return hashlib.sha256(np.asarray(text, "<i4").tobytes()).hexdigest()


def _download() -> Path:
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging

    cached = try_to_load_from_cache(_REPO, _FILE, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    manual = (
        f"download {_FILE} from the dataset {_REPO} of the hub, unpack it, and name one of its files, "
        f"wikitext-2-raw/wiki.test.raw, as the text; or connect once, and it stays in {constants.HF_HUB_CACHE}"
    )
    # The library reports each attempt; one line at the end says it all.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        return Path(hf_hub_download(_REPO, _FILE, repo_type="dataset"))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise QuantkitError(f"WikiText-2 is not cached, and the hub cannot be reached: {manual}") from None
    except (errors.HfHubHTTPError, OSError) as error:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QuantkitError(f"WikiText-2 could not be downloaded ({problem}): {manual}") from None
    finally:
        logging.set_verbosity(verbosity)
