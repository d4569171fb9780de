"""Progress of a command: a bar on a terminal, else a line every half minute. Both start in the first second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quantkit.compile.observers import observers
from quantkit.wording import printable, size_text

if TYPE_CHECKING:
    from tqdm import tqdm

REFRESH = 0.5  # seconds between redrawings of a bar
# Seconds until the first line where there is no terminal, and then between lines: short commands stay silent.
FIRST_LINE, LINES = 10.0, 30.0
MOMENT = 0.2


class Progress:
    """Shows how far a command is, while its context is entered; nothing if `hidden`.

    `unit` is "B" for bytes, or the name of what is counted, of which a part may be done.
    """

    def __init__(self, title: str, unit: str, total: int | None = None, hidden: bool = False) -> None:
        self.title, self.unit, self.total, self.hidden = title, unit, total, hidden
        self.done: float = 0
        self._note = self._compiling = ""
        self._began = time.monotonic()
        # Seconds spent compiling kernels, which say nothing about speed, and when the current compilation began.
        self._compiled = 0.0
        self._compiling_since = self._began
        # When the first and the latest batch were done, in seconds without compilation, and how much was done then.
        self._first: tuple[float, float] | None = None
        self._latest: tuple[float, float] = (0.0, 0)
        self._line_at = self._began + FIRST_LINE
        self._bar: tqdm[Any] | None = None
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        """Start showing it."""
        if self.hidden:
            return self
        observers.append(self._observe)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self.title,
                total=self.total,
                unit=self.unit,
                unit_scale=self.unit == "B",
                file=sys.stderr,
                leave=False,
                dynamic_ncols=True,
                bar_format=self._form(),
            )
            self._draw()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop showing it."""
        if self.hidden:
            return
        observers.remove(self._observe)
        self._over.set()
        self._ticker.join()
        if self._bar is not None:
            self._bar.close()

    def advance(self, step: float, note: str = "") -> None:
        """Add `step` to what is done; `note` says what is being done, or the result so far."""
        self.update(self.done + step, self.total, note)

    def update(self, done: float, total: int | None, note: str = "") -> None:
        """Set how much is done, and of how much; `note` is as for `advance`."""
        self.done, self.total, self._note = done, total, printable(note)
        now = self._computing()
        if done:
            self._latest = now, done
        # Updates within a moment belong to one batch.
        if done and (self._first is None or now - self._first[0] < MOMENT):
            self._first = now, done

    def _observe(self, compiling: str) -> None:
        now = time.monotonic()
        if self._compiling:
            self._compiled += now - self._compiling_since
        self._compiling, self._compiling_since = compiling, now

    def _computing(self) -> float:
        """Seconds since the start without those in which kernels were compiled."""
        now = self._compiling_since if self._compiling else time.monotonic()
        return now - self._began - self._compiled

    def seconds_left(self) -> float | None:
        """Estimate the time left; None until a batch is done, and while kernels are being compiled."""
        if self._first is None or self.total is None or self._compiling:
            return None
        (began, first), (at, done) = self._first, self._latest
        # The first batch had to load weights, so the speed is that of the others as soon as there are any.
        took, counted = (at - began, done - first) if done > first else (began, first)
        return max(0.0, (self.total - done) * took / counted - (self._computing() - at))

    def state(self) -> str:
        """Describe the progress in one line: how much is done, the time left, and what is being done."""
        if self._first is None:
            doing = f"compiling {self._compiling}" if self._compiling else "running"
            return f"{self.title}: {doing}, {_duration(time.monotonic() - self._began)} so far"
        if self.unit == "B":
            counted = f"{size_text(int(self.done))} of {size_text(self.total or 0)}"
        else:
            counted = f"{int(self.done)} of {self.total} {self.unit}s"
        return ", ".join([f"{self.title}: {counted}", *self._details()])

    def _details(self) -> list[str]:
        left = self.seconds_left()
        return [
            *([f"{_duration(left)} left"] if left is not None else []),
            *([f"compiling {self._compiling}"] if self._compiling else []),
            *([self._note] if self._note else []),
        ]

    def _form(self) -> str:
        """tqdm's format of the bar, which counts what is done as a whole."""
        counted = "{n_fmt}" if self.unit == "B" else f"{int(self.done)}"
        return f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {counted}/{{total_fmt}} {{unit}} [{{elapsed}}{{postfix}}]"

    def _tick(self) -> None:
        while not self._over.wait(REFRESH):
            with suppress(OSError):
                self._draw()

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.n, self._bar.total = self.done, self.total
            self._bar.bar_format = self._form()
            self._bar.set_postfix_str(", ".join(self._details()), refresh=True)
        elif time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + LINES
            print(self.state(), file=sys.stderr, flush=True)


@contextmanager
def above_bars() -> Iterator[None]:
    """Print messages within this context above the bar, not into it."""
    if "tqdm" not in sys.modules:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        yield


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
