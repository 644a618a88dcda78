"""How a verb's progress looks: a live view on a terminal, plain lines in a log. Always on stderr."""

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from jobs.notices import warnings_to
from pipelines.progress import Progress as Listener
from pipelines.progress import plain

_LOG_SECONDS = 10.0
_KNOWN_SECONDS = 0.2
"""After which a rate means something."""


@contextlib.contextmanager
def kept_where_interrupted(progress: Listener) -> Iterator[None]:
    """Say that work which is done piece by piece goes on where it was interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        progress.say("what is finished is kept: the same command goes on with the rest")
        raise


def listener() -> "LiveView | LogLines":
    """The view that suits stderr."""
    return LiveView() if sys.stderr.isatty() else LogLines()


class _View(Listener):
    """Warnings become lines of the view while it is open."""

    def __enter__(self) -> Self:
        self._catcher = warnings.catch_warnings()
        self._catcher.__enter__()
        warnings_to(self.say)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._catcher.__exit__(kind, error, trace)


class _TimeLeft(TimeRemainingColumn):
    """Nothing while it is not known."""

    def render(self, task: Task) -> Text:
        if task.total is None or task.time_remaining is None:
            return Text("")
        return Text.assemble(super().render(task), (" left", "dim"))


class _Pace:
    """Units a second of what is counted, since it was first heard of."""

    def __init__(self) -> None:
        self._unit, self._since, self._first = "", 0.0, 0

    def rate(self, done: int, unit: str) -> float | None:
        """None while it is not known."""
        now = time.monotonic()
        if unit != self._unit or done < self._first:  # something else is counted now
            self._unit, self._since, self._first = unit, now, done
        seconds = now - self._since
        return (done - self._first) / seconds if seconds > _KNOWN_SECONDS and done > self._first else None


class LiveView(_View):
    """One line for each finished step, a bar with rate and time left for the one in hand."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            _TimeLeft(compact=True),
            console=self._console,
            transient=True,
        )
        self._task: Any = None
        self._pace = _Pace()
        self._started = 0.0

    def __enter__(self) -> Self:
        super().__enter__()
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()
        super().__exit__(*error)

    def start(self, step: str, doing: str = "") -> None:
        self._drop()
        self._task = self._bar.add_task(step, total=None, figures=f"[dim]{escape(doing)}[/dim]")
        self._pace, self._started = _Pace(), time.monotonic()

    def advance(self, done: int, total: int, unit: str, rate: float | None = None, **figures: float) -> None:
        if self._task is None:
            self.start("")
        rate = self._pace.rate(done, unit) if rate is None else rate
        parts = [f"{done:,}/{total:,} {unit}"]
        if rate:
            parts.append(f"{_figures(rate)} {unit}/s")
        parts += [f"{name} {plain(value)}" for name, value in figures.items()]
        self._bar.update(self._task, completed=done, total=total, figures="  ".join(parts))

    def finish(self, step: str, outcome: str, skipped: bool = False) -> None:
        mark = "[dim]=[/dim]" if skipped else "[green]✓[/green]"
        note = " [dim](done before)[/dim]" if skipped else f" [dim]{time.monotonic() - self._started:.1f} s[/dim]"
        self._console.print(f"{mark} [bold]{step:<9}[/bold] {escape(outcome)}{note}", soft_wrap=True)
        self._drop()

    def say(self, text: str) -> None:
        self._console.print(f"  {text}", markup=False)

    def _drop(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


class LogLines(_View):
    """A line when a step begins and ends, and one every ten seconds between."""

    def __init__(self) -> None:
        self._step, self._said, self._pace, self._started = "", 0.0, _Pace(), 0.0

    def start(self, step: str, doing: str = "") -> None:
        self._step, self._pace, self._started = step, _Pace(), time.monotonic()
        self._said = time.monotonic()
        self.say(f"{step}: {doing or 'begins'}")

    def advance(self, done: int, total: int, unit: str, rate: float | None = None, **figures: float) -> None:
        now, measured = time.monotonic(), self._pace.rate(done, unit)
        if now - self._said < _LOG_SECONDS:
            return
        self._said = now
        rate = measured if rate is None else rate
        speed = f", {_figures(rate)} {unit}/s, {(total - done) / rate:.0f} s left" if rate else ""
        more = "".join(f", {name} {plain(value)}" for name, value in figures.items())
        self.say(f"{self._step}: {done:,}/{total:,} {unit}{speed}{more}")

    def finish(self, step: str, outcome: str, skipped: bool = False) -> None:
        note = "done before" if skipped else f"{time.monotonic() - self._started:.1f} s"
        self.say(f"{step}: {outcome} ({note})")

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _figures(rate: float) -> str:
    """Two figures at least: what makes a step in three seconds does not stand still."""
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"
