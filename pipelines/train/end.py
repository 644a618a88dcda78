"""Where a run ends: at `train.images`, or before, where its budget is spent or its score gets no better.

What a limit came to is recorded in images, with the limit: under the same one the run is complete, under another it
goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.errors import UserError
from pipelines.sections import Train
from pipelines.train.run import Run
from pipelines.train.scores import HeldOutScore, best, patience_ran_out

FORMAT = 1
_END = "end.json"

Why = Literal["budget", "plateau"]


@dataclass(frozen=True)
class End:
    """An end before `train.images`."""

    step: int
    why: Why

    def told(self, train: Train) -> str:
        """In words, with what makes it again without a clock or scores."""
        images = self.step * train.global_batch
        reason = "its budget was spent" if self.why == "budget" else "its held-out score got no better"
        return f"ended at {images:,} images, for {reason}: `train.images: {images}` makes the same model again"


def limits(train: Train) -> dict[str, Any]:
    """What can end a run before `train.images`, as plain values."""
    plain = train.model_dump(mode="json", include={"budget_minutes", "plateau"})
    if train.plateau is not None and train.score is not None:
        plain["score"] = train.score.model_dump(mode="json", include={"every_images", "images", "timesteps"})
    return plain


def record_end(run: Run, train: Train, end: End) -> None:
    """Keep where the run ended, and of what came after it nothing but what other limits came to."""
    record = {"format": FORMAT, "step": end.step, "images": end.step * train.global_batch, "why": end.why}
    (run.place / _END).write_json({**record, "limits": limits(train)})
    for step in run.checkpoints.steps():
        if step > end.step and not run.checkpoints.is_pinned(step):
            run.checkpoints.at(step).remove()


def recorded_end(run: Run, train: Train) -> End | None:
    """The end that these limits came to, if they have, before `train.images`."""
    place = run.place / _END
    if not place.exists():
        return None
    record: Mapping[str, Any] = place.read_json()
    if record["format"] != FORMAT:
        raise UserError(f"{place} has format {record['format']}: this version reads {FORMAT}")
    if record["limits"] != limits(train) or record["step"] >= train.total_steps:
        return None
    return End(record["step"], record["why"])


def known_end(run: Run, train: Train) -> End | None:
    """The end before `train.images` that is recorded, or that the scores come to."""
    end = recorded_end(run, train) or plateau_end(run, train)
    return None if end is None or end.step >= train.total_steps else end


def last_step(run: Run, train: Train) -> int:
    """The step at which the run is complete, as far as is known."""
    end = known_end(run, train)
    return train.total_steps if end is None else end.step


def plateau_end(run: Run, train: Train, unsaved: Sequence[HeldOutScore] = ()) -> End | None:
    """The end that the scores so far come to: those of the run's folder, and others that are still to get there."""
    if train.plateau is None:
        return None
    wanted = set(train.scored_steps(train.total_steps))
    scores = [score for score in [*run.scores.all(train.total_steps), *unsaved] if score.step in wanted]
    step = patience_ran_out(scores, train.plateau)
    return None if step is None else End(step, "plateau")


def settled_step(run: Run, train: Train) -> int | None:
    """The step up to which no score that is still to come can end the run; None for all of them."""
    if train.plateau is None:
        return None
    done = set(run.scores.steps())
    waiting = [step for step in train.scored_steps(train.total_steps) if step not in done]
    return waiting[0] if waiting else train.total_steps


def kept_for_scores(run: Run, train: Train) -> set[int]:
    """Steps whose checkpoints are still needed: those to be scored, the newest scored one, which may turn out to be the
    run's end, and the best, where it is to be kept.
    """
    scored = run.scores.steps()
    kept = {step for step in train.scored_steps(train.total_steps) if step not in scored}
    if train.plateau is not None:
        kept.update(scored[-1:])
    if train.keep_best and (top := best(_of_kept(run))) is not None:
        kept.add(top.step)
    return kept


def _of_kept(run: Run) -> list[HeldOutScore]:
    there = set(run.checkpoints.steps())
    return [score for score in run.scores.all() if score.step in there]
