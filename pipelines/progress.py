"""What a verb says while it works. The command line decides how it looks; the default is to say nothing."""

from typing import Any


class Progress:
    """A listener of one verb's work; every method does nothing until overridden."""

    def start(self, step: str, doing: str = "") -> None:
        """A step of the pipeline begins."""

    def advance(self, done: int, total: int, unit: str, rate: float | None = None, **figures: float) -> None:
        """The step in hand has done so much of its total; `rate` in units/s where the step measures its own."""

    def finish(self, step: str, outcome: str, skipped: bool = False) -> None:
        """A step ended, or was found done."""

    def say(self, text: str) -> None:
        """One line worth knowing."""


def counted(number: int, noun: str) -> str:
    """1 image, 1,797 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def plain(value: Any) -> str:
    """A number as people write it: 12,345 or 0.123."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
