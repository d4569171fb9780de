"""Work on many machines: processes of a Dask cluster that reach the same files, or read the same hub model.

No bytes of a model travel through the scheduler. Workers open the source themselves, and write what they made into the
unfinished output file, at the places that the plan gives; so the same bytes come whoever writes them, and a part that
is done twice, after a worker has died, is written twice alike. Dask pickles what it sends: a cluster is for a network
that is trusted.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.sources.source import TensorSource
from quantkit.wording import count_text

log = logging.getLogger(__name__)

CONNECT = 20.0  # seconds to wait for the scheduler
LOCAL = "local:"


@dataclass(frozen=True)
class Task:
    """A call of `function` on a worker; `name` is what Dask's dashboard shows."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class ClusterLostError(QuantkitError):
    """The scheduler has gone away: what is finished may be kept, for another run."""


class Cluster:
    """Workers that run functions: of the Dask scheduler at `address` (tcp://host:8786), or `local:N` processes here.

    A context manager. Raises QuantkitError when Dask is not installed, when no scheduler answers, and when its workers
    run another version of quantkit.
    """

    def __init__(self, address: str) -> None:
        try:
            import distributed
        except ImportError:
            raise QuantkitError("a cluster needs Dask: pip install 'quantkit[cluster]'") from None
        _silence()
        self.address = address
        self._own: Any = None
        if address.startswith(LOCAL):
            count = address.removeprefix(LOCAL)
            if not count.isdecimal() or not 0 < int(count) <= 1024:
                raise QuantkitError(f"{address}: not a cluster: use local:N for N processes on this machine")
            self._own = distributed.LocalCluster(
                n_workers=int(count), threads_per_worker=1, dashboard_address="127.0.0.1:0"
            )
            address = self._own.scheduler_address
        elif "://" not in address:
            raise QuantkitError(f"{address}: not a cluster: use tcp://HOST:8786, of a Dask scheduler, or local:N")
        try:
            self._client: Any = distributed.Client(address, timeout=CONNECT)
        except (OSError, ValueError, TypeError) as error:
            self.close()
            raise QuantkitError(f"{self.address}: no Dask scheduler answers there: {_line(error)}") from None
        _silence()
        self._check_versions()
        if self._client.dashboard_link and importlib.util.find_spec("bokeh") is not None:
            log.info("%s: what is under way is shown at %s", self.address, self._client.dashboard_link)

    def _check_versions(self) -> None:
        """Refuse workers that would write other bytes. One that joins later is asked again, by every task."""
        try:
            found = self._client.run(_version)
        except Exception as error:  # a worker without quantkit cannot even say so
            self.close()
            raise QuantkitError(f"{self.address}: its workers cannot run quantkit: {_line(error)}") from None
        if not found:
            log.warning("%s: there is no worker yet; waiting for one", self.address)
        for worker, version in found.items():
            if version != _version():
                self.close()
                raise QuantkitError(f"{worker}: has quantkit {version}, not {_version()}; install the same everywhere")

    @property
    def threads(self) -> int:
        """The threads of the worker that has most; 1 where there is none yet."""
        return max(self._threads_of_each().values(), default=1)

    @property
    def n_workers(self) -> int:
        """The workers that there are now."""
        return len(self._threads_of_each())

    def _threads_of_each(self) -> dict[str, int]:
        try:
            found: dict[str, int] = self._client.nthreads()
        except (OSError, TimeoutError):
            raise self._lost() from None
        return found

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Any]]:
        """Carry out tasks on the workers; (number of the task, result) as they end.

        A task whose worker dies is given to another. Raises the QuantkitErrors of tasks, and one when the scheduler is
        lost or a task has ended several workers.
        """
        import distributed

        from quantkit import __version__

        listed = list(tasks)
        numbers = {}
        for number, task in enumerate(listed):
            future = self._client.submit(
                _call, __version__, task.function, *task.arguments, key=f"{task.name}-{os.urandom(6).hex()}", pure=False
            )
            numbers[future] = number
        log.info("%s: %s", self.address, count_text(len(listed), "task"))
        try:
            for future in distributed.as_completed(list(numbers)):
                number = numbers.pop(future)
                try:
                    result = future.result()
                except QuantkitError:
                    raise
                except distributed.KilledWorker as error:
                    raise QuantkitError(
                        f"{self.address}: several workers have died of {listed[number].name!r}; perhaps their memory "
                        f"is too small: {_line(error)}"
                    ) from None
                except Exception as error:
                    lost = self._client.status != "running" or isinstance(error, (OSError, TimeoutError))
                    kind = type(error).__name__
                    if lost or "Cancelled" in kind or "Comm" in kind:
                        raise self._lost() from None
                    raise QuantkitError(f"{self.address}: {listed[number].name}: {kind}: {_line(error)}") from None
                future.release()
                yield number, result
        finally:
            if numbers:
                with suppress(Exception):
                    self._client.cancel(list(numbers), force=True)

    def _lost(self) -> ClusterLostError:
        return ClusterLostError(f"{self.address}: the scheduler has gone away; start it and run this again")

    def close(self) -> None:
        """Leave the cluster, and end what was started for it here."""
        client = getattr(self, "_client", None)
        if client is not None and self._own is None and client.status == "running":
            with suppress(Exception):
                client.run(let_go)
        for part in (getattr(self, "_client", None), self._own):
            with suppress(Exception):
                if part is not None:
                    part.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _silence() -> None:
    """Silence Dask's loggers, which each have a level of their own: they repeat with tracebacks what an error says."""
    for name in ["distributed", "tornado", "asyncio", *logging.root.manager.loggerDict]:
        if name.partition(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _version() -> str:
    from quantkit import __version__

    return __version__


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _call(version: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` on a worker."""
    if version != _version():
        raise QuantkitError(f"a worker has quantkit {_version()}, not {version}; install the same everywhere")
    return function(*arguments)


def worker_limits() -> tuple[int, int]:
    """The threads and the bytes of memory that the worker has which this is called on."""
    import distributed

    worker = distributed.get_worker()
    return worker.state.nthreads, worker.memory_manager.memory_limit or sys.maxsize


# What this process keeps between tasks, as a worker: one thing, and what it is.
_kept: tuple[object, Any] = (None, None)


def kept(key: object, make: Callable[[], Any]) -> Any:
    """What `make` gives, kept on this worker until another `key` is asked for, or the run is over."""
    global _kept
    if _kept[0] != key:
        let_go()
        _kept = key, make()
    return _kept[1]


def let_go() -> None:
    """Keep nothing."""
    global _kept
    _kept = None, None


def packed(source: TensorSource) -> bytes:
    """`source` as workers open it again; raises QuantkitError where they cannot."""
    try:
        return pickle.dumps(source)
    except (TypeError, AttributeError, pickle.PicklingError):
        raise QuantkitError(
            f"{source.label}: only a file, a checkpoint or a hub model can be sent to workers"
        ) from None


@functools.lru_cache(maxsize=4)
def opened(source: bytes) -> TensorSource:
    """The source that `packed` packed, opened once in each worker."""
    found: TensorSource = pickle.loads(source)
    return found
