"""What is due by the clock on the wall, and what is asked of a run from outside: rank 0 looks, and tells all others by
the exchange of a step, so that all act after the same one.
"""

import time
from typing import Literal

from pipelines.sections import Train
from pipelines.train.run import Run

Word = Literal["", "checkpoint", "score", "end", "stop"]

WORDS: tuple[Word, ...] = ("", "checkpoint", "score", "end", "stop")
"""As numbers, for the exchange: their places here. A score is taken of a checkpoint; `end` is that of a budget."""

SCORING_SHARE = 0.05
"""Of the time on the wall that ranks may spend on scores, if no interval is given."""

_LOOK_SECONDS = 0.2
FORWARD_SHARE = 1 / 3
"""Of a training step: what an image costs the network that only looks at it."""


class Pace:
    """Rank 0's, of one attempt at a run."""

    def __init__(self, run: Run, train: Train, spent: float, scoring_calls: int) -> None:
        """spent: seconds that the steps before took. scoring_calls: images that the network sees for a score; 0 where
        none is taken unless a step is due for it.
        """
        self._run, self._train, self._before, self._calls = run, train, spent, scoring_calls
        self._began = self._looked_at = self._saved_at = time.monotonic()
        self._steps = 0
        self._scoring = 0.0
        """Seconds spent on scores."""
        self._last_score: float | None = None
        """Seconds that the last one took."""
        self._answers = False

    def word(self, step: int) -> Word:
        """What is to be done after the step that is about to be taken, the `step`th."""
        now = time.monotonic()
        self._steps += 1
        if now - self._looked_at > _LOOK_SECONDS:
            self._looked_at = now
            if (asked := self._run.asked()) is not None:
                self._answers = asked == "checkpoint"
                return asked
        if self._train.budget_minutes is not None and self.spent() >= 60 * self._train.budget_minutes:
            return "end"
        if self._is_score_due(step, now):
            return "score"
        minutes = self._train.checkpoint_minutes
        return "checkpoint" if minutes is not None and now - self._saved_at >= 60 * minutes else ""

    def spent(self) -> float:
        """Seconds of training so far, those of earlier attempts included as far as their steps were kept."""
        return self._before + time.monotonic() - self._began

    def saved(self) -> None:
        """A checkpoint was made: what was asked is done."""
        self._saved_at = time.monotonic()
        if self._answers:
            self._run.forget_asked()
            self._answers = False

    def scored(self, seconds: float) -> None:
        self._last_score = seconds
        self._scoring += seconds

    def _is_score_due(self, step: int, now: float) -> bool:
        if not self._calls or (step % self._train.checkpoint_every and step != self._train.total_steps):
            return False
        elapsed = now - self._began
        image = elapsed / max(1, self._steps - 1) / self._train.global_batch
        cost = self._calls * image * FORWARD_SHARE if self._last_score is None else self._last_score
        return self._scoring + cost <= SCORING_SHARE * elapsed


def spent_until(run: Run, train: Train, step: int) -> float:
    """Seconds that the steps up to this one took, by the journal."""
    rates = (row.wall.get("images_per_second", 0.0) for row in run.journal.read(step))
    return sum(train.global_batch / rate for rate in rates if rate > 0)
