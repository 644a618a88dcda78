"""Held-out scores of a run, one file a scored step, and what follows from them: the best, and whether it gets better.

`scores/STEP.json`, and `STEP.png` with what the average draws there. A score is a function of the weights alone: who
computes it, and when, changes no bit of it.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.sections.train import Plateau, Train
from pipelines.store import Place

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """Of the moving average after a step, on held-out images."""

    step: int
    images: int
    """Images seen until then."""
    bits_per_dim: float | None
    """Estimate of the bound, the mean over the scored images; None where it is not finite."""
    low: float | None
    high: float | None
    """Its 95 % interval."""
    error: tuple[float | None, ...]
    """Mean squared error of the predicted noise by bin of log-SNR, as many timesteps in each, from data to noise."""
    log_snr: tuple[float | None, ...]
    """The bounds of these bins, falling, one more than there are bins; None for minus infinity."""
    scored: int
    """Held-out images."""
    asked: tuple[int, int]
    """Images and timesteps by `train.score`: scores of other settings are not compared."""
    seconds: float
    """How long it took; of no meaning to the others."""
    time_ms: int
    """When, in milliseconds since the epoch: the timestamp of its metrics."""


class Scores:
    """The scores of a run, in a folder of their own."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def commit(self, score: HeldOutScore, grid: bytes) -> None:
        """Keep a score and its picture; the score last, which says that both are there."""
        self.picture(score.step).write(grid)
        self._at(score.step).write_json({"format": FORMAT, **asdict(score)})

    def steps(self) -> list[int]:
        """The steps with a score, rising."""
        return sorted(int(n.removesuffix(".json")) for n in self.place.list() if n.endswith(".json"))

    def read(self, step: int) -> HeldOutScore:
        record: dict[str, Any] = self._at(step).read_json()
        if (found := record.pop("format")) != FORMAT:
            raise ValueError(f"{self._at(step)} has format {found}, not {FORMAT}")
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
        return HeldOutScore(**fields)

    def all(self) -> list[HeldOutScore]:
        """All of them, by step."""
        return [self.read(step) for step in self.steps()]

    def taken(self, train: Train) -> list[HeldOutScore]:
        """Those of a spec's settings, by step."""
        return [] if train.score is None else [score for score in self.all() if score.asked == settings(train)]

    def picture(self, step: int) -> Place:
        return self.place / f"{step:09d}.png"

    def _at(self, step: int) -> Place:
        return self.place / f"{step:09d}.json"


def settings(train: Train) -> tuple[int, int]:
    """What the numbers of a score depend on, beside the weights: images and timesteps."""
    assert train.score is not None
    return train.score.images, train.score.timesteps


def best(scores: Iterable[HeldOutScore]) -> HeldOutScore | None:
    """The first of those with the least bits/dim; None where none is finite."""
    found: HeldOutScore | None = None
    for score in scores:
        if score.bits_per_dim is not None and (found is None or score.bits_per_dim < (found.bits_per_dim or 0.0)):
            found = score
    return found


def patience_ran_out(scores: Iterable[HeldOutScore], plateau: Plateau) -> int | None:
    """The first scored step that lies `patience_images` after the last gain; None while there is hope.

    A gain lies more than `least_gain` below the best before it, which is the last gain's.
    """
    level, since = None, 0
    for score in sorted(scores, key=lambda score: score.step):
        value = score.bits_per_dim
        if value is not None and (level is None or value < level - plateau.least_gain):
            level, since = value, score.images
        elif score.images - since >= plateau.patience_images:
            return score.step
    return None
