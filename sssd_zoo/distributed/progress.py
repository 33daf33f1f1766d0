"""How far a step is: a bar in terminals and notebooks, and elsewhere (a log file, a pipe, CI) plain lines with times.

A line every half minute, none with carriage returns:

    2026-03-04 16:34:12 MoCo v2: epoch 3/20, step 120/800 (15 %), 183 img/s, loss 6.123, 4 min left
"""

import sys
import time
from collections.abc import Callable
from typing import Any, Self

from tqdm.auto import tqdm

EVERY = 30.0  # seconds between lines
SOON = 10.0  # seconds to the first line, and the least between two, as at the ends of short epochs


def progress_bar(
    total: int | None,
    title: str,
    unit: str,
    *,
    disable: bool = False,
    leave: bool = True,
    initial: int = 0,
    step_size: int | None = None,
    delay: float = 0,
) -> Any:
    """A bar of tqdm, or `ProgressLines` where stderr is neither a terminal nor a notebook's.

    Both are context managers and have `update`, `set_postfix`, `refresh`, `write` and `close`.

    Args:
        total: units in all, or None where that is unknown.
        title: of the step.
        unit: such as 'img'.
        disable: show nothing.
        leave: whether the bar stays when it is complete, or a line says so.
        initial: units done before.
        step_size: units of an optimiser step, for a training: lines count those.
        delay: seconds before a bar appears.
    """
    if disable or sys.stderr.isatty() or in_notebook():
        many = {"unit_scale": True, "mininterval": 0.5} if step_size else {}
        return tqdm(
            total=total, desc=title, unit=unit, disable=disable, leave=leave, initial=initial, delay=delay, **many
        )
    return ProgressLines(total, title, unit, leave=leave, initial=initial, step_size=step_size)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


class ProgressLines:
    """What tqdm's bar does of what is used here, as lines on stderr; see `progress_bar` for the arguments.

    Args:
        total: see there, as for all others.
        title: of the step.
        unit: of the counts.
        leave: end with a line.
        initial: units done before.
        step_size: units of a step.
        clock: seconds from anywhere.
    """

    def __init__(
        self,
        total: int | None,
        title: str,
        unit: str,
        *,
        leave: bool = True,
        initial: int = 0,
        step_size: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.title, self.unit, self.leave, self.step_size = total, title, unit, leave, step_size
        self.initial = self.done = initial
        self.clock = clock
        self.values: dict[str, Any] = {}
        self.began = clock()
        self.said, self.said_done = self.began, initial
        self.due = self.began + SOON

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it."""
        self.close()

    def update(self, n: int = 1) -> None:
        """Counts units that are done."""
        self.done += n
        if self.clock() >= self.due and self.done != self.total:  # the last line is that of `close`
            self._say(self._left())

    def set_postfix(self, refresh: bool = True, **values: Any) -> None:
        """What the next lines say besides; `refresh` is tqdm's."""
        self.values = values

    def refresh(self) -> None:
        """A line now, as at the end of an epoch, unless there has just been one or the last one is to come."""
        if self.clock() - self.said >= SOON and self.done != self.total:
            self._say(self._left())

    def write(self, text: str) -> None:
        """A line of its own."""
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.title}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends with a line on the whole, also where it ended early; a second call does nothing."""
        if self.leave:
            seconds = self.clock() - self.began
            self.said, self.said_done = self.began, self.initial  # so that the rate is that of the whole
            self._say(f"took {duration(seconds)}")
        self.leave = False

    def _say(self, end: str | None) -> None:
        now = self.clock()
        rate = (self.done - self.said_done) / max(now - self.said, 1e-6)
        self.said, self.said_done, self.due = now, self.done, now + EVERY
        values = [f"{name} {value}" for name, value in self.values.items()]
        first, others = (values[:1], values[1:]) if self.step_size else ([], values)  # the epoch
        self.write(", ".join([*first, self._count(), speed(rate, self.unit), *others, *([end] if end else [])]))

    def _count(self) -> str:
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        percent = f"({100 * self.done / max(1, self.total):.0f} %)"
        if self.step_size:
            return f"step {self.done // self.step_size:,}/{self.total // self.step_size:,} {percent}"
        return f"{self.done:,}/{self.total:,} {self.unit} {percent}"

    def _left(self) -> str | None:
        """How long the rest takes at the mean rate so far."""
        if self.total is None or self.done <= self.initial:
            return None
        seconds = (self.clock() - self.began) / (self.done - self.initial) * (self.total - self.done)
        return f"{duration(seconds)} left"


def speed(rate: float, unit: str) -> str:
    """A rate, such as '183 img/s', with two digits where it is below 10."""
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


def duration(seconds: float) -> str:
    """About how long, in words: '41 s', '4 min', '2 h 05 min'; of less than a second '1 s'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
