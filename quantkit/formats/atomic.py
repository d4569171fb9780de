"""Files that appear whole or not at all: everything that quantkit writes goes through here.

The bytes go to a temporary file of a unique name in the same directory, created exclusively, so that two runs never
share one and a link planted under its name is not followed. When everything is written it is synced to the disk and
given the final name in one step. That step does not replace what has appeared under the name in the meantime, unless
the caller was told to replace it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Union

from quantkit.errors import QuantkitError
from quantkit.wording import size_text

if TYPE_CHECKING:
    import numpy as np

Name = Union[str, "os.PathLike[str]"]

# Bytes given to the system at a time. Linux is several times faster at caching an eighth of a megabyte at a time
# than several megabytes at once.
WRITE = 1 << 17
# Bytes after which the system is asked to begin writing to the disk, so that little is left to do when syncing.
WRITEBACK = 8 << 20
# Outputs of one group that are open at once; the others are opened again when more is written to them.
MAX_OPEN = 16
SUFFIX = ".partial"

# Temporary files of this process, for `remove_temporaries`.
_temporaries: set[Path] = set()


class OutputGroup:
    """The files that one command writes: all of them appear when the block ends well, none when it fails.

    A context manager. `force` lets outputs replace regular files. `inputs` are files that no output may replace even
    then. `directory`, and those above it, are made when a file is written there, and removed again on failure; any
    other directory must exist.
    """

    def __init__(self, *, force: bool = False, inputs: Iterable[Name] = (), directory: Name | None = None) -> None:
        self.force = force
        self._inputs = _identities(inputs)
        self._directory = None if directory is None else Path(directory)
        self._made: list[Path] = []
        self._files: list[OutputFile] = []
        self._places: set[Path] = set()
        self._open: list[OutputFile] = []
        self._then: list[Callable[[], None]] = []
        self.lock = threading.RLock()

    def protect(self, inputs: Iterable[Name]) -> None:
        """Name further files that no output may replace."""
        self._inputs |= _identities(inputs)

    def add(self, path: Name, nbytes: int = 0, kept_in: Path | None = None) -> OutputFile:
        """A file to write, of `nbytes` if that is known. Nothing is created before the first byte is written.

        Until it has its name it is in the directory `kept_in`, if one is given, where it stays if the run fails, for
        another run to go on with.
        Raises QuantkitError when `path` is no name that may be written: something is there that must not be replaced,
        its directory is missing, or another output has it.
        """
        file = OutputFile(self, Path(path), nbytes, kept_in)
        self._refuse(file.path)
        place = _place(file.path)
        if place in self._places:
            raise QuantkitError(f"{file.path}: two outputs have the same name")
        self._places.add(place)
        self._files.append(file)
        return file

    def _refuse(self, path: Path) -> None:
        if not path.name:
            raise QuantkitError(f"{path}: is a directory; name the file to write")
        home = path.parent
        with _told(path):
            if not home.is_dir() and not (self._directory is not None and home.is_relative_to(self._directory)):
                raise QuantkitError(f"{path}: cannot be written: there is no directory {home}")
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                return
        if stat.S_ISDIR(mode):
            raise QuantkitError(f"{path}: is a directory; name the file to write")
        if not self._inputs.isdisjoint(_identities([path])):
            raise QuantkitError(f"{path}: is the input; write the output to another file")
        if stat.S_ISLNK(mode):
            raise QuantkitError(f"{path}: is a symbolic link, which is never replaced; write to another name")
        if not stat.S_ISREG(mode):
            raise QuantkitError(f"{path}: is a device or a pipe, which is never replaced; write to another name")
        if not self.force:
            raise QuantkitError(f"{path}: exists already", option="force")

    def check(self, path: Name) -> None:
        """Raise QuantkitError when `path` is no name that may be written, before anything is computed for it."""
        self._refuse(Path(path))

    def then(self, action: Callable[[], None]) -> None:
        """Call `action` when all files have their names."""
        self._then.append(action)

    def place(self, path: Name) -> Path:
        """The temporary path of the file that will be `path`."""
        return next((file.temporary for file in self._files if file.path == Path(path)), Path(path))

    def check_space(self) -> None:
        """Raise QuantkitError when a disk has too little space for what is still to be written to it."""
        by_disk: dict[int, list[OutputFile]] = {}
        for file in self._files:
            by_disk.setdefault(_existing(file.path.parent).stat().st_dev, []).append(file)
        for files in by_disk.values():
            home = _existing(files[0].path.parent)
            needed, free = sum(max(0, file.nbytes - file.allocated) for file in files), shutil.disk_usage(home).free
            if free < needed:
                what = f"{files[0].path}: needs" if len(files) == 1 else f"{home}: {len(files)} files need"
                raise QuantkitError(f"{what} {size_text(needed)}, but only {size_text(free)} are free there")

    def make_directory(self, home: Path) -> None:
        """Create the directory `home` of a file if the group may."""
        missing = []
        while not home.is_dir():
            missing.append(home)
            home = home.parent
        for each in reversed(missing):
            with suppress(FileExistsError):
                each.mkdir()
                self._made.append(each)

    def opened(self, file: OutputFile) -> None:
        """Note that `file` is open and was used last; of too many, close the one that was not used for longest."""
        if file in self._open:
            self._open.remove(file)
        self._open.append(file)
        if len(self._open) > MAX_OPEN:
            self._open.pop(0).close()

    def closed(self, file: OutputFile) -> None:
        """Note that `file` is closed."""
        if file in self._open:
            self._open.remove(file)

    def commit(self) -> None:
        """Give every file its name. Raises QuantkitError when one cannot have it; then none has been created."""
        try:
            for file in self._files:
                file.seal()
            for file in self._files:
                self._refuse(file.path)
            for file in self._files:
                file.publish()
            for home in {file.path.parent for file in self._files}:
                _sync_directory(home)
        except BaseException:
            self.discard()
            raise
        for action in self._then:
            action()

    def discard(self) -> None:
        """Remove everything that was created."""
        for file in self._files:
            file.discard()
        for home in reversed(self._made):
            with suppress(OSError):
                home.rmdir()

    def __enter__(self) -> OutputGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the files their names, or remove what there is of them."""
        if kind is None:
            self.commit()
        else:
            self.discard()


class OutputFile:
    """A file being written, one of an OutputGroup. `temporary` is where its bytes are until it gets its name.

    `write` appends, `write_at` puts bytes anywhere. Raises QuantkitError when the system refuses.
    """

    def __init__(self, group: OutputGroup, path: Path, nbytes: int, kept_in: Path | None = None) -> None:
        self.group, self.path, self.nbytes = group, path, nbytes
        stem = os.fsdecode(os.fsencode(path.name)[:200])
        self._kept = kept_in is not None
        own = f"{stem}{SUFFIX}" if kept_in is not None else f"{stem}.{secrets.token_hex(4)}{SUFFIX}"
        self.temporary = (kept_in or path.parent) / own
        self.written = 0
        self.sealed = False
        self._replaced = False  # whether its name was another file's
        self._end = 0
        self._alone = False
        self._unsynced = 0
        self._descriptor: int | None = None
        self._identity: tuple[int, int] | None = None  # device and inode, once created

    @classmethod
    def of(cls, target: Name | OutputFile) -> OutputFile:
        """`target`, or, where it is only a name, a file of its own that `finish` or `abandon` will end."""
        if isinstance(target, OutputFile):
            return target
        file = OutputGroup().add(target)
        file._alone = True
        return file

    def begin(self, nbytes: int) -> None:
        """Say how large the file will be. Raises QuantkitError when the disk has too little space for it.

        For a file of a group, that is for the group to ask, when all its files are known.
        """
        self.nbytes = nbytes
        if self._alone:
            self.group.check_space()

    def finish(self) -> None:
        """Finish the file: give it its name, or leave that to its group."""
        if self._alone:
            self.group.commit()
        else:
            self.seal()

    def abandon(self) -> None:
        """Abandon the file after an error: remove it, or leave that to its group."""
        if self._alone:
            self.group.discard()
        else:
            self.close()

    def write(self, data: bytes | bytearray | memoryview | np.ndarray) -> None:
        """Append bytes, or the bytes of a contiguous array."""
        self.write_at(self._end, data)

    def write_at(self, offset: int, data: bytes | bytearray | memoryview | np.ndarray) -> None:
        """Write bytes, or the bytes of a contiguous array, at byte `offset`. Safe from several threads."""
        view = memoryview(data)  # type: ignore[arg-type]
        if not view.nbytes:
            return
        view = view.cast("B")
        with self.group.lock, _told(self.path, self.nbytes):
            descriptor, at = self._opened(), offset
            while at < offset + view.nbytes:
                at += _write_at(descriptor, view[at - offset : at - offset + WRITE], at)
            self.written += view.nbytes
            self._end = max(self._end, at)
            self._unsynced += view.nbytes
            if self._unsynced >= WRITEBACK:
                _start_writeback(descriptor)
                self._unsynced = 0

    def extend(self, nbytes: int) -> None:
        """Extend the file to `nbytes`, with zeros where nothing was written."""
        with self.group.lock, _told(self.path, self.nbytes):
            os.ftruncate(self._opened(), nbytes)

    @property
    def allocated(self) -> int:
        """Bytes of the disk that the file has already: those written, or those that an earlier run left."""
        if self._kept and not self.written:
            with suppress(OSError):
                status = self.temporary.stat()
                return min(status.st_size, getattr(status, "st_blocks", 0) * 512)
        return self.written

    def sync(self) -> None:
        """See that what has been written is on the disk."""
        with self.group.lock, _told(self.path, self.nbytes):
            os.fsync(self._opened())

    def hand_out(self) -> tuple[Path, tuple[int, int]]:
        """Where other processes may write: the temporary file, of its full size now, and its device and inode."""
        self.extend(self.nbytes)
        assert self._identity is not None
        return self.temporary.absolute(), self._identity

    def _opened(self) -> int:
        if self._descriptor is None:
            if self.sealed:
                raise ValueError(f"{self.path}: written to after its end")
            flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            if self._identity is None:
                self.group.make_directory(self.path.parent)
                flags |= os.O_CREAT | (0 if self._kept else os.O_EXCL)
                if not self._kept:
                    _temporaries.add(self.temporary)
            try:
                self._descriptor = os.open(self.temporary, flags, 0o666)
            except FileExistsError:
                _temporaries.discard(self.temporary)  # somebody else's
                raise
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise QuantkitError(f"{self.temporary}: is in the way: not an unfinished file; remove it")
            identity = status.st_dev, status.st_ino
            if self._identity not in (None, identity):
                raise QuantkitError(f"{self.temporary}: was replaced while it was written")
            self._identity = identity
        self.group.opened(self)
        return self._descriptor

    def close(self) -> None:
        """Close the temporary file, for now."""
        with self.group.lock:
            descriptor, self._descriptor = self._descriptor, None
            self.group.closed(self)
            if descriptor is not None:
                os.close(descriptor)

    def seal(self) -> None:
        """Sync everything to the disk and close the temporary file. It can be read there from now on."""
        with self.group.lock, _told(self.path, self.nbytes):
            if not self.sealed:
                os.fsync(self._opened())
                self.sealed = True
            self.close()

    def publish(self) -> None:
        """Give the sealed file its name. Raises QuantkitError when the name is taken."""
        with _told(self.path):
            if self.group.force:
                self._replaced = os.path.lexists(self.path)
                self.temporary.replace(self.path)
            else:
                _rename_to_free_name(self.temporary, self.path)
        _temporaries.discard(self.temporary)

    def discard(self) -> None:
        """Remove the file, under its temporary name or, where it did not replace another, its final one.

        A file that is kept stays under its temporary name.
        """
        self.close()
        if self._kept and self.temporary.exists():
            return
        if self.temporary in _temporaries:
            self.temporary.unlink(missing_ok=True)
            _temporaries.discard(self.temporary)
        if self._identity is not None and not self._replaced:
            with suppress(OSError):
                status = self.path.lstat()
                if (status.st_dev, status.st_ino) == self._identity:
                    self.path.unlink()


class SharedFile:
    """The unfinished file `path` of another process, maybe on another machine, to write parts of.

    A context manager; when it ends well, what was written is on the disk. `identity` is the file's device and inode
    where it was made: the device's number may differ elsewhere, the inode's does not. Raises QuantkitError when it is
    not there, or another file, or cannot be written.
    """

    def __init__(self, path: Path, identity: tuple[int, int]) -> None:
        self.path = path
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._descriptor = os.open(path, flags)
        except OSError as error:
            raise QuantkitError(
                f"{path}: a worker cannot write it: {error.strerror or error}; it must be where all workers reach it"
            ) from None
        if os.fstat(self._descriptor).st_ino != identity[1]:
            os.close(self._descriptor)
            raise QuantkitError(f"{path}: is another file for this worker; it must be where all workers reach it")

    def read_into(self, offset: int, buffer: np.ndarray) -> None:
        """Fill the contiguous `buffer` with the bytes from `offset` on."""
        with open(self._descriptor, "rb", buffering=0, closefd=False) as file:
            file.seek(offset)
            left = memoryview(buffer).cast("B")  # type: ignore[arg-type]
            while left:
                count = file.readinto(left)
                if not count:
                    raise QuantkitError(f"{self.path}: cut short while it was used")
                left = left[count:]

    def write_at(self, offset: int, data: np.ndarray) -> None:
        """Write the bytes of a contiguous array at byte `offset`."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        with _told(self.path):
            while view:
                count = _write_at(self._descriptor, view[:WRITE], offset)
                view, offset = view[count:], offset + count

    def sync(self) -> None:
        """Have what was written on the disk."""
        with _told(self.path):
            os.fsync(self._descriptor)

    def __enter__(self) -> SharedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.sync()
        finally:
            os.close(self._descriptor)


def write_whole(target: Name | OutputFile, data: bytes | str) -> None:
    """Write a whole file: bytes, or text in UTF-8."""
    file = OutputFile.of(target)
    try:
        file.write(data.encode() if isinstance(data, str) else data)
    except BaseException:
        file.abandon()
        raise
    file.finish()


def remove_temporaries() -> None:
    """Remove every temporary file of this process that is left: for a process that ends without unwinding."""
    for path in list(_temporaries):
        with suppress(OSError):
            path.unlink()


@contextmanager
def _told(path: Path, nbytes: int = 0) -> Iterator[None]:
    """Convert errors of the system to QuantkitErrors that name the file."""
    try:
        yield
    except OSError as error:
        needs = f"; it needs {size_text(nbytes)} in all" if nbytes else ""
        raise QuantkitError(f"{path}: cannot be written: {error.strerror or error}{needs}") from None


def _rename_to_free_name(source: Path, target: Path) -> None:
    """Rename without replacing: a second name, which the system refuses where one exists, and the first removed."""
    taken = QuantkitError(f"{target}: exists already: it appeared while it was being written", option="force")
    try:
        if os.name == "nt":
            source.rename(target)  # refuses by itself there
            return
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise taken from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # No hard links on this file system: take the name with an empty file, and replace that.
        try:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            raise taken from None
        source.replace(target)
    else:
        source.unlink()


def _identities(paths: Iterable[Name]) -> set[object]:
    """What identifies files: their resolved paths, and their inodes, for other names of the same file."""
    known: set[object] = set()
    for path in paths:
        with suppress(OSError):
            status = os.stat(path)  # noqa: PTH116
            known |= {(status.st_dev, status.st_ino), _place(Path(path)), Path(path).resolve()}
    return known


def _place(path: Path) -> Path:
    """The absolute path of a name, with links in its directory resolved, but not the name itself."""
    return path.parent.resolve() / path.name


def _existing(home: Path) -> Path:
    """`home`, or the nearest directory above it that exists."""
    while not home.is_dir() and home != home.parent:
        home = home.parent
    return home


def _sync_directory(home: Path) -> None:
    if os.name == "nt":  # has no such thing
        return
    with suppress(OSError):
        descriptor = os.open(home, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_at(descriptor: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.write(descriptor, data)


def _no_writeback(descriptor: int) -> None:
    """Where the system cannot be asked."""


def _find_writeback() -> Callable[[int], None]:
    try:
        call: Any = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):
        return _no_writeback
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    begin = 2  # SYNC_FILE_RANGE_WRITE
    return lambda descriptor: call(descriptor, 0, 0, begin)


_start_writeback = _find_writeback()
