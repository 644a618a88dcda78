"""Two evaluations side by side: what may be compared, what cannot be told apart, and pictures of both."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pipelines import report
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.evaluate.answers import Evaluation
from pipelines.evaluate.scores import MORE_IS_BETTER, Score, comparable
from pipelines.files import StorageError
from pipelines.progress import Progress
from pipelines.store import DamageError, Place, identity

_SHOWN = 32
_COLUMNS = 16

Verdict = Literal["first", "second", "cannot tell", "not comparable"]


@dataclass(frozen=True)
class Comparison:
    """One score of two."""

    name: str
    first: float
    second: float
    verdict: Verdict
    """Which is better, where their 95 % intervals do not meet."""
    differs: dict[str, tuple[Any, Any]]
    """The fields of provenance that forbid the comparison, with both values."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(first: Evaluation, second: Evaluation) -> list[Comparison]:
    """Every score that both have. UserError, naming the fields that differ, where none may be compared."""
    others = {score.name: score for score in second.scores}
    found = [_compare(score, others[score.name]) for score in first.scores if score.name in others]
    if all(one.verdict == "not comparable" for one in found):
        fields = sorted({field for one in found for field in one.differs})
        raise UserError(f"nothing of these two can be compared: they differ in {', '.join(fields)}")
    return found


def _compare(a: Score, b: Score) -> Comparison:
    missing = "not recorded"
    differs = {
        field: (a.provenance.get(field, missing), b.provenance.get(field, missing)) for field in comparable(a, b)
    }
    verdict: Verdict = "cannot tell"
    if differs:
        verdict = "not comparable"
    elif a.interval[1] < b.interval[0] or b.interval[1] < a.interval[0]:
        verdict = "first" if (a.value > b.value) == (a.name in MORE_IS_BETTER) else "second"
    return Comparison(a.name, a.value, b.value, verdict, differs)


def keep_pictures(both: Sequence[Evaluation], store: Place, progress: Progress) -> Place | None:
    """Write the picture of two evaluations' images into the store; None where there is none. A line says why, and
    another one where the images are not of the same seeds."""
    seeds = [_seed(one) for one in both]
    if seeds[0] != seeds[1] or None in seeds:
        said = " and ".join("not recorded" if seed is None else str(seed) for seed in seeds)
        progress.say(
            f"warning: they were not drawn from the same seeds ({said}): image by image they have nothing in common"
        )
    if not all(one.images for one in both):
        progress.say("warning: there is no picture of both: one's images were not kept (evaluate.keep_samples)")
        return None
    try:
        drawn = side_by_side([Place.of(one.images) for one in both])
    except (UserError, DamageError, StorageError) as error:
        progress.say(f"warning: there is no picture of both: {error}")
        return None
    picture = store / "comparisons" / f"{identity([one.images for one in both])[:16]}.png"
    picture.write(drawn)
    return picture


def _seed(evaluation: Evaluation) -> int | None:
    """That the images were drawn from; None where it is not known, or they were not drawn."""
    known = (score.provenance.get("sample_seed") for score in evaluation.scores)
    return next((seed for seed in known if seed is not None), None)


def side_by_side(places: Sequence[Place]) -> bytes:
    """The first images of each of two sampling jobs, one set above the other: of the same seeds where the jobs have."""
    rows = []
    for place in places:
        split = Dataset.open(place).split("train")
        ends = np.cumsum([0, *split.shard_sizes])
        wanted = np.arange(min(_SHOWN, len(split)) // _COLUMNS * _COLUMNS or min(_SHOWN, len(split)))
        shards = np.searchsorted(ends, wanted, side="right") - 1
        rows.append(Reader(split).read(shards, wanted - ends[shards])[0])
    count = min(len(row) for row in rows)
    return report.grid(np.concatenate([row[:count] for row in rows]), columns=min(_COLUMNS, count))
