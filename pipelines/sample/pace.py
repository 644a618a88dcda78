"""How fast images were drawn, and how much of the time went into drawing them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Made:
    """What became of a part of a job: when, by which process."""

    count: int
    process: tuple[str, int]
    """Host and process id."""
    began: float
    ended: float
    """Seconds since the epoch."""
    drawing: float
    """Seconds of them inside the sampler."""
    changed: tuple[str, ...] = ()
    """In words, what its bits may depend on and was another way where the first images were drawn."""


def images_per_second(made: Sequence[Made]) -> float | None:
    """From the first part's begin to the last one's end; None where nothing was drawn."""
    drawn = [part for part in made if part.drawing]
    if not drawn:
        return None
    seconds = max(part.ended for part in drawn) - min(part.began for part in drawn)
    return sum(part.count for part in drawn) / seconds if seconds > 0 else None  # clocks of hosts may differ


def drawing_share(made: Sequence[Made]) -> float | None:
    """Of the time between each process's first begin and last end, what it spent inside the sampler."""
    drawn = [part for part in made if part.drawing]
    spans = [
        (min(p.began for p in drawn if p.process == process), max(p.ended for p in drawn if p.process == process))
        for process in {part.process for part in drawn}
    ]
    seconds = sum(end - begin for begin, end in spans)
    return sum(part.drawing for part in drawn) / seconds if seconds > 0 else None
