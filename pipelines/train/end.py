"""Where a run ends: at `train.images`, or before, where its budget is spent or its score gets no better.

What a limit came to is recorded in images, with the limit: under the same one the run is complete, under another it
goes on.
"""

from collections.abc import Iterable, Mapping
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
        reason = "its budget was spent"
        if self.why == "plateau":
            assert train.plateau is not None
            least, patience = train.plateau.least_gain, train.plateau.patience_images
            gain = f"gained no more than {least:g} bits/dim" if least else "got no better"
            reason = f"its held-out score {gain} in {patience:,} images"
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


def plateau_end(run: Run, train: Train) -> End | None:
    """The end that the scores so far come to."""
    return None if train.plateau is None else end_of(run.scores.taken(train), train)


def end_of(scores: Iterable[HeldOutScore], train: Train) -> End | None:
    """The end that such scores of a run come to, of those that are taken at the spec's interval."""
    if train.plateau is None:
        return None
    wanted = set(train.scored_steps(train.total_steps))
    step = patience_ran_out([score for score in scores if score.step in wanted], train.plateau)
    return None if step is None else End(step, "plateau")


def awaited_scores(run: Run, train: Train) -> list[int]:
    """Steps of the spec's interval, up to the run's newest checkpoint and its end, whose score is not taken though
    their checkpoint is there; rising.
    """
    there = set(run.checkpoints.steps())
    wanted = [step for step in train.scored_steps(max(there, default=0)) if step in there]
    if not wanted:
        return []
    done, end = {score.step for score in run.scores.taken(train)}, last_step(run, train)
    return [step for step in wanted if step not in done and step <= end]


def lost_scores(run: Run, train: Train) -> list[int]:
    """Steps of the spec's interval that the run went past, and of which it has neither a score nor a checkpoint."""
    there = run.checkpoints.steps()
    done = {score.step for score in run.scores.taken(train)} | set(there)
    return [step for step in train.scored_steps(max(there, default=0)) if step not in done]


def settled_step(run: Run, train: Train) -> int | None:
    """The step up to which no score that is still to come can end the run; None for all of them."""
    if train.plateau is None:
        return None
    newest = max(run.checkpoints.steps(), default=0)
    to_come = [step for step in train.scored_steps(train.total_steps) if step > newest]
    return min([*awaited_scores(run, train), *to_come, train.total_steps])


def kept_for_scores(run: Run, train: Train) -> set[int]:
    """Steps whose checkpoints are still needed: those to be scored, the newest scored one, which may turn out to be the
    run's end, that end, and the best, where it is to be kept.
    """
    wanted = train.scored_steps(train.total_steps)
    if not wanted:
        return set()
    scores = run.scores.taken(train)
    done = {score.step for score in scores}
    kept = {step for step in wanted if step not in done}
    if (end := end_of(scores, train)) is not None:
        kept.add(end.step)
    if train.plateau is not None and done:
        kept.add(max(done))
    there = set(run.checkpoints.steps())
    if train.keep_best and (top := best(score for score in scores if score.step in there)) is not None:
        kept.add(top.step)
    return kept
