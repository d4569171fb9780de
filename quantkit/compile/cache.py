"""Where the machine code of kernels is kept between runs: the user's cache directory, by the platform's convention.

A folder holds the kernels of one package (blocks, evaluate, vocabulary) of one version of the source; in it, a pair of
files holds one kernel for one signature, processor and version of Python. So an existing file never becomes invalid,
and processes need no lock.

Loading machine code runs it, and its files hold pickles. So they are only read if they belong to the user, are in a
folder that nobody else can write, and match their checksum.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

log = logging.getLogger(__name__)

# Number of source versions whose machine code is kept; the oldest are deleted first.
KEPT_VERSIONS = 8
_CHECKSUM = hashlib.sha256().digest_size
_PACKAGE = Path(__file__).parent.parent
# Called with a kernel and a signature that are not in the cache, before they are compiled: see `ahead`.
before_compiling: Callable[[KernelCache, Any], None] | None = None


def cache_home() -> Path:
    """The directory of quantkit's machine code: NUMBA_CACHE_DIR if set, else the user's cache directory.

    Raises RuntimeError when the user has no home directory.
    """
    if named := getattr(config, "CACHE_DIR", ""):
        return Path(named, "quantkit")
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local or Path.home() / "AppData" / "Local", "quantkit")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quantkit"
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    return Path(named if Path(named).is_absolute() else Path.home() / ".cache", "quantkit")


@functools.cache
def source_digest(package: Path) -> str:
    """A digest of everything that the machine code of the kernels in directory `package` depends on.

    Pieces are inlined from the package itself and from the blocks; options come from `compile.kernel`, LLVM code from
    `compile.lowering` and numba.
    """
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in [
        *sorted(package.glob("*.py")),
        *sorted((_PACKAGE / "blocks").glob("*.py")),
        _PACKAGE / "compile" / "kernel.py",
        _PACKAGE / "compile" / "lowering.py",
    ]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _folder(package: Path, home: Path) -> Path | None:
    """The folder for the kernels of directory `package`, created if needed; None when it cannot be written."""
    folder = home / f"{package.name}-{source_digest(package)}"
    try:
        home.mkdir(0o700, parents=True, exist_ok=True)
        _keep_private(home)
        if not folder.is_dir():
            folder.mkdir(0o700, exist_ok=True)
            versions = sorted(home.glob(f"{package.name}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
            for old in [path for path in versions if path != folder][KEPT_VERSIONS - 1 :]:
                shutil.rmtree(old, ignore_errors=True)
        _keep_private(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        log.debug("no cache of kernels: %s", error)
        return None
    return folder


def _is_own(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to the user. Windows protects a user's cache by itself."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def _keep_private(folder: Path) -> None:
    """Make `folder` writable by the user alone. Raises PermissionError where it belongs to somebody else."""
    status = folder.stat()
    if not _is_own(status):
        raise PermissionError(f"{folder} belongs to another user")
    if hasattr(os, "geteuid") and status.st_mode & 0o022:
        folder.chmod(0o700)


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """numba's pair of files with a checksum in front of each: numba's own class would run whatever it finds."""

    def _load_index(self) -> dict[Any, str]:
        try:
            version, stamp, overloads = pickle.loads(self._read(self._index_path))
        except FileNotFoundError:
            return {}
        return overloads if (version, stamp) == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write(self._index_path, self._dump((self._version, self._source_stamp, overloads)))  # type: ignore[no-untyped-call]

    def _load_data(self, name: str) -> Any:
        return pickle.loads(self._read(self._data_path(name)))  # type: ignore[no-untyped-call]

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), self._dump(data))  # type: ignore[no-untyped-call]

    @staticmethod
    def _read(path: str) -> bytes:
        with open(path, "rb") as file:
            if not _is_own(os.fstat(file.fileno())):
                raise PermissionError(f"{path} belongs to another user")
            contents = file.read()
        data = contents[_CHECKSUM:]
        if hashlib.sha256(data).digest() != contents[:_CHECKSUM]:
            raise ValueError(f"{path} is damaged")
        return data

    def _write(self, path: str, data: bytes) -> None:
        with self._open_for_write(path) as file:  # type: ignore[no-untyped-call]
            file.write(hashlib.sha256(data).digest() + data)


class _Locator:
    """Tells numba where the code of a function is kept, by its protocol of locators."""

    def __init__(self, function: Any, folder: Path) -> None:
        self._py_file, self._line = function.__code__.co_filename, function.__code__.co_firstlineno
        self._folder = folder

    @classmethod
    def from_function(cls, function: Any, file: str) -> _Locator | None:
        """The locator of `function`; None when nothing can be kept."""
        try:
            folder = _folder(Path(file).parent, cache_home()) if Path(file).is_file() else None
        except RuntimeError:
            return None
        return None if folder is None else cls(function, folder)

    def get_cache_path(self) -> str:
        """The folder."""
        return str(self._folder)

    def ensure_cache_path(self) -> None:
        """Create the folder again if another process has deleted it."""
        self._folder.parent.mkdir(0o700, parents=True, exist_ok=True)
        self._folder.mkdir(0o700, exist_ok=True)

    def get_source_stamp(self) -> str:
        """numba's check that cached code is valid; the folder's name already contains what it depends on."""
        return self._folder.name

    def get_disambiguator(self) -> str:
        """What distinguishes functions of the same name."""
        return str(self._line)


class _Implementation(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [_Locator]  # noqa: RUF012


class KernelCache(FunctionCache):  # type: ignore[misc]
    """The cached machine code of one kernel. Raises RuntimeError when there is no directory to write to.

    numba's own class lists all signatures of a function in one index, which processes that compile different ones
    at the same time would corrupt; here each signature has its own. A cache that cannot be used is not an error.
    """

    _impl_class = _Implementation

    def holds(self, signature: Any, codegen: Any) -> bool:
        """Whether the cache holds the kernel for `signature` and the processor of `codegen`."""
        try:
            return self._choose(signature, codegen) in self._cache_file._load_index()
        except Exception:  # whatever unpickling a damaged file raises
            return False

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The kernel compiled for `sig`, or None."""
        loaded = self._load(sig, target_context)
        if loaded is None and before_compiling is not None:
            before_compiling(self, sig)
            loaded = self._load(sig, target_context)
        return loaded

    def _load(self, sig: Any, target_context: Any) -> Any:
        try:
            self._choose(sig, target_context.codegen())
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever unpickling a damaged file raises
            log.debug("%s is not read from the cache: %r", self._name, error)
            with suppress(OSError):
                self._cache_file.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Store `data`, the kernel compiled for `sig`."""
        try:
            self._choose(sig, data.codegen)
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except OSError as error:
            log.debug("%s is not kept in the cache: %s", self._name, error)

    def _choose(self, sig: Any, codegen: Any) -> Any:
        """Select the files of `sig` (numba calls this under its compiler lock) and return numba's key for them."""
        key = self._index_key(sig, codegen)  # type: ignore[no-untyped-call]
        name = f"{self._impl.filename_base}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
        self._cache_file = _Files(self._cache_path, name, self._impl.locator.get_source_stamp())  # type: ignore[no-untyped-call]
        return key
