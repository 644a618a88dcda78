"""The scores of a set and their floors as work of processes, each part kept by all that it depends on: who was killed
goes on, and floors are worked out once for all models.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.cluster import Cluster
from pipelines.evaluate.frechet import Features
from pipelines.evaluate.kept import found, kept_json, over_kept
from pipelines.evaluate.measure import MEASURE
from pipelines.evaluate.scores import Floors, Score
from pipelines.evaluate.sets import PARTS, Extractor, SetFeatures, floor_part, set_scores, uniform_noise
from pipelines.store import Place, identity, sha256

_LARGE = 2**18
"""Numbers in the features of n images from which on a part takes longer than processes take to begin."""


def floors_at(
    n: int, real: Features, net: Extractor, shape: tuple[int, int, int], seed: int, store: Place, cluster: Cluster
) -> Floors:
    """The floors at n of held-out images with these features [M, d], of a shape (H, W, C). UserError where n is too
    small."""
    known = {
        "real": _digest(real),
        "net": net.digest,
        "preprocessing": net.preprocessing,
        "shape": list(shape),
        "n": n,
        "seed": seed,
        "measure": MEASURE,
    }
    folder = store / "floors" / identity(known)[:16]
    work = functools.partial(_floor, real, net, (n, *shape), seed, folder)
    return Floors.joined(n, _each(work, PARTS, folder, n * real.shape[1], cluster))


def scores_of(
    sets: SetFeatures,
    seed: int,
    provenance: Mapping[str, Any],
    floors: Floors,
    store: Place,
    cluster: Cluster,
    parts: Sequence[str] = PARTS,
) -> list[Score]:
    """All scores of sets, in order, or those of some parts."""
    known = {
        "ours": _digest(sets.ours),
        "real": _digest(sets.real),
        "net": sets.digest,
        "seed": seed,
        "floors": [floors.n, dict(floors.floors), floors.noise],
        "measure": MEASURE,
    }
    folder = store / "statistics" / identity(known)[:16]
    # What the caller knows of the images is not part of the work: of the same images it may be more or less.
    work = functools.partial(_scores, sets, seed, floors, folder)
    records = _each(work, parts, folder, sets.n * sets.real.shape[1], cluster)
    facts = sets.provenance(seed, provenance)
    scores = [Score.from_json(record) for part in records for record in part]
    return [Score(one.name, one.value, one.interval, {**one.provenance, **facts}) for one in scores]


def _each(work: Callable[[str], Any], parts: Sequence[str], folder: Place, numbers: int, cluster: Cluster) -> list[Any]:
    """What is kept of each part, those that lack worked out: by several processes from the start where the features of
    n images are so many numbers that a part takes long."""
    there = {part: found(_place(folder, part), json.loads) for part in parts}
    lacking = [part for part in parts if there[part] is None]
    processes = max(1, min(cluster.cpus(), len(lacking))) if len(lacking) > 1 and numbers > _LARGE else None
    for place, value in over_kept(work, lacking, cluster, processes):
        there[lacking[place]] = value
    return [there[part] for part in parts]


def _floor(
    real: Features, net: Extractor, shape: tuple[int, ...], seed: int, folder: Place, part: str
) -> dict[str, float]:
    def make() -> dict[str, float]:
        return floor_part(part, real, shape[0], seed, lambda: net.features(uniform_noise(shape, seed)))

    return kept_json(_place(folder, part), make)


def _scores(sets: SetFeatures, seed: int, floors: Floors, folder: Place, part: str) -> list[dict[str, Any]]:
    def make() -> list[dict[str, Any]]:
        return [score.to_json() for score in set_scores(part, sets, seed, {}, floors)]

    return kept_json(_place(folder, part), make)


def _place(folder: Place, part: str) -> Place:
    return folder / f"{part}.json"


def _digest(features: Features) -> str:
    return sha256(features.tobytes())
