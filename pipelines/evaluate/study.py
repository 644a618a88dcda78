"""A sampler study: one model drawn from in many ways, its quality against what each costs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipelines import report
from pipelines.data.manifest import Dataset
from pipelines.errors import UserError
from pipelines.evaluate.job import score_quality
from pipelines.evaluate.scores import Score
from pipelines.fields import read_yaml
from pipelines.mistakes import nearest
from pipelines.models import Model
from pipelines.sections import Sample
from pipelines.session import Session
from pipelines.store import identity

_SHORT = {"ema": "ema_length"}
_NOT_VARIED = ("n", "seed", "labels", "workers", "threads", "resources", "chunk")
"""What decides no image, or would draw other images by the same means."""


@dataclass(frozen=True)
class Way:
    """One way to draw, and how well it did."""

    setting: Mapping[str, Any]
    """By field of `sample`, those that the study varies."""
    calls: int
    """Of the network, for one image: guidance takes two a step."""
    score: Score


@dataclass(frozen=True)
class Study:
    """All ways, in the order of the grid."""

    ways: list[Way]
    picture: str

    @property
    def best(self) -> Way:
        return min(self.ways, key=lambda way: way.score.value)

    @property
    def cheapest(self) -> Way:
        """Of the ways that are not told apart from the best, in whose interval they lie, the one with fewest calls."""
        within = [way for way in self.ways if way.score.value <= self.best.score.interval[1]]
        return min(within, key=lambda way: (way.calls, way.score.value))

    def to_json(self) -> dict[str, Any]:
        ways = [{"setting": dict(w.setting), "calls": w.calls, "score": w.score.to_json()} for w in self.ways]
        named = {"best": dict(self.best.setting), "cheapest": dict(self.cheapest.setting)}
        return {"ways": ways, **named, "picture": self.picture}


def parse_grid(words: Sequence[str]) -> list[dict[str, Any]]:
    """All combinations of `steps=10,20 sampler=ddim,ancestral`, the last field varying fastest. UserError for a field
    that is none of `sample`, or that decides no image."""
    known = [name for name in Sample.model_fields if name not in _NOT_VARIED]
    fields: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        field = _SHORT.get(name, name)
        if not equals or not text:
            raise UserError(f"--grid {word}: write it as steps=10,20,50")
        if field not in known:
            near = nearest(field, [*known, *_SHORT])
            hint = f"did you mean {near}?" if near else f"it may be {', '.join(known)}"
            raise UserError(f"--grid {word}: {hint}")
        if field in fields:
            raise UserError(f"--grid {word}: {name} is there twice")
        values = text.split(",")
        if "" in values or len(set(values)) < len(values):
            raise UserError(f"--grid {word}: each value once, between commas")
        try:
            fields[field] = [read_yaml(value) for value in values]
        except yaml.YAMLError:
            raise UserError(f"--grid {word}: a value of it is not valid YAML") from None
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def study(
    grid: Sequence[Mapping[str, Any]], model_of: Callable[[Sequence[str]], Model], dataset: Dataset, session: Session
) -> Study:
    """Draw and score every way of the grid, all from the same seeds. `model_of` makes a model by `sample.x=y` words."""
    ways = []
    models = [model_of([f"sample.{name}={_word(value)}" for name, value in one.items()]) for one in grid]
    for number, (setting, model) in enumerate(zip(grid, models, strict=True)):
        chosen = model.spec.sample
        session.progress.start(f"way {number + 1} of {len(grid)}", said(setting))
        score = score_quality(model, dataset, model.spec, session)
        calls = chosen.steps * (1 if chosen.guidance == 1 else 2)
        ways.append(Way(setting, calls, score))
        session.progress.finish(f"way {number + 1}", f"{said(setting)}: Frechet {score.value:.3g}")
    key = identity([dict(way.setting) | {"score": way.score.to_json()} for way in ways])[:16]
    place = session.store / "studies" / key / "study.png"
    found = Study(ways, str(place))
    place.write(picture(found))
    (place.parent / "study.json").write_json(found.to_json())
    return found


def picture(found: Study) -> bytes:
    """Quality against cost: a line for each way of drawing, over its numbers of steps."""
    lines: dict[str, list[tuple[int, float, tuple[float, float]]]] = {}
    for way in found.ways:
        rest = {name: value for name, value in way.setting.items() if name != "steps"}
        lines.setdefault(said(rest) or "Frechet", []).append((way.calls, way.score.value, way.score.interval))
    floor = found.ways[0].score.provenance["floor"]
    cheapest = found.cheapest
    return report.quality_against_cost(lines, floor, (cheapest.calls, cheapest.score.value))


def said(setting: Mapping[str, Any]) -> str:
    """A way in words."""
    short = {field: name for name, field in _SHORT.items()}
    return ", ".join(f"{short.get(name, name)} {_word(value)}" for name, value in setting.items())


def _word(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
