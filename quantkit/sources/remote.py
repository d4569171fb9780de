"""The weights of a checkpoint on the hub, read where they are needed and never kept on disk.

What the safetensors library checks is a local file: each shard has one here that holds the real header and is otherwise
a hole of the shard's size, which takes no space. Reads of weights go to the hub instead, by HTTP ranges of one commit,
in windows that are somewhat larger than a piece of a tensor, so that what is read next is there already.
"""

from __future__ import annotations

import fnmatch
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.formats.reading import InputFile
from quantkit.formats.safetensors import INDEX, MAX_JSON
from quantkit.sources.hub import FILES, download, hub_errors

if TYPE_CHECKING:
    import numpy as np

SHARDS = "model*.safetensors"
WINDOW = 16 << 20  # bytes asked for at a time
# Windows of a shard that are kept: threads read pieces near each other, at places a little apart.
_KEPT = 4
_TRIES = 5
_FIRST_GUESS = 1 << 16  # bytes in which most headers end


class RemoteShards:
    """The safetensors files of the repository `repo_id`, of which nothing but the headers is downloaded.

    `directory` is where its other files are, downloaded into the hub's cache; `names` are the shards. Raises
    QuantkitError when the hub cannot be reached or does not have the repository, and when a shard is no such file.
    """

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi

        self.repo_id = repo_id
        with hub_errors(repo_id, revision):
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        if info.sha is None:
            raise QuantkitError(f"{repo_id}: the hub does not say which commit this is")
        self.commit = info.sha
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
        self.directory = download(repo_id, self.commit, [name for name in FILES if name != SHARDS])
        self._sizes = {name: size for name, size in sizes.items() if fnmatch.fnmatchcase(name, SHARDS) and size}
        self._home = tempfile.TemporaryDirectory(prefix="quantkit-")
        self.names = sorted(name for name in self._sizes if "/" not in name and name != INDEX)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is the same commit's, and reads the hub from where it is opened again."""
        return RemoteShards, (self.repo_id, self.commit)

    def open(self, name: str) -> RemoteFile:
        """The shard `name`. Its header is read now."""
        return RemoteFile(self.repo_id, self.commit, name, self._sizes[name], Path(self._home.name) / name)


class RemoteFile(InputFile):
    """A shard on the hub, read by position; `stand_in` becomes the local file of its size with its header."""

    def __init__(self, repo_id: str, commit: str, name: str, nbytes: int, stand_in: Path) -> None:
        from huggingface_hub import hf_hub_url

        self._label, self._size = f"{repo_id}/{name}", nbytes
        self._url = hf_hub_url(repo_id, name, revision=commit)
        self._windows: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._coming: dict[int, threading.Lock] = {}
        head = self._get(0, min(_FIRST_GUESS, nbytes))
        end = 8 + int.from_bytes(head[:8], "little")
        if nbytes < 10 or end > min(nbytes, 8 + MAX_JSON):
            raise QuantkitError(f"{self._label}: not a safetensors file: its header would end at byte {end}")
        while len(head) < end:
            head += self._get(len(head), min(end, len(head) + WINDOW))
        with open(stand_in, "wb") as file:
            file.write(head[:end])
            file.truncate(nbytes)
        super().__init__(stand_in)

    def read_into(self, offset: int, buffer: np.ndarray | bytearray) -> None:
        """See InputFile. Raises QuantkitError when the hub does not answer, after several tries."""
        left = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while left:
            window, inside = divmod(offset, WINDOW)
            data = self._window(window)[inside : inside + len(left)]
            if not data:
                raise self.changed()
            left[: len(data)] = data
            left, offset = left[len(data) :], offset + len(data)

    def _window(self, index: int) -> bytes:
        """The window `index` of the file. Threads that want the same wait for one of them to get it."""
        with self._lock:
            coming = self._coming.setdefault(index, threading.Lock())
        with coming:
            with self._lock:
                if (found := self._windows.get(index)) is not None:
                    self._windows.move_to_end(index)
                    return found
            data = self._get(index * WINDOW, min(self._size, (index + 1) * WINDOW))
            with self._lock:
                self._windows[index] = data
                self._coming.pop(index, None)
                while len(self._windows) > _KEPT:
                    self._windows.popitem(last=False)
            return data

    def _get(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`. huggingface_hub tries again what the hub refuses; here, what breaks off."""
        from huggingface_hub import utils

        hub: Any = utils  # which does not declare what it exports
        headers = {**hub.build_hf_headers(), "range": f"bytes={start}-{stop - 1}"}
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(min(8.0, 0.5 * 2**attempt))
            try:
                answer = hub.http_backoff("GET", self._url, headers=headers, timeout=60)
                hub.hf_raise_for_status(answer)
                if answer.status_code == 206 and len(answer.content) == stop - start:
                    return bytes(answer.content)
                if answer.status_code == 200 and start == 0 and len(answer.content) == stop:
                    return bytes(answer.content)
                problem = f"it answered with {len(answer.content)} of {stop - start} bytes"
            except Exception as error:  # of requests or httpx, whichever huggingface_hub uses
                problem = next(iter(str(error).splitlines()), type(error).__name__)
        raise QuantkitError(f"{self._label}: bytes {start} to {stop} cannot be read from the hub: {problem[:200]}")
