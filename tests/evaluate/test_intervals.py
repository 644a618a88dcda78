"""Of what is stated as a 95 % interval: how often the truth lies in it, over worlds that were drawn again."""

import json

import numpy as np
import pytest
from scipy import stats

from pipelines.evaluate.chance import halves_of_both, jackknife_interval, never_sure, share_interval
from pipelines.evaluate.memory import memory, nearest
from pipelines.evaluate.scores import Floors
from pipelines.evaluate.sets import SetFeatures, frechet_score, kernel_score, neighbour_scores

WIDTH = 8
NO_FLOORS = dict.fromkeys(("frechet", "kid", "precision", "recall", "density", "coverage"), 0.0)

Found = dict[str, tuple[float, tuple[float, float]]]
"""Value and interval by score."""


def found_in(world: int, samples: int, held_out: int, replicates: int) -> Found:
    """All scores of a model whose images lie too close together and beside the real ones."""
    random = np.random.default_rng((samples, held_out, world))
    mix = np.eye(WIDTH) + np.random.default_rng(0).normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
    ours = 0.6 * random.normal(size=(samples, WIDTH)) @ mix + 1
    real, train = (random.normal(size=(n, WIDTH)) @ mix for n in (held_out, 200))
    sets = SetFeatures(ours, real, real[:2], "f", "p")
    given = {"seed": world, "provenance": {}, "floors": Floors(sets.n, NO_FLOORS, 0.0), "replicates": replicates}
    scores = [frechet_score(sets, splits=5, **given), kernel_score(sets, **given), *neighbour_scores(sets, **given)]
    near = memory(nearest(ours, train).distance, nearest(real, train).distance, world)
    return {score.name: (score.value, score.interval) for score in scores} | {"near": (near.rate, near.interval)}


@pytest.mark.parametrize(("samples", "held_out"), [(60, 120), (100, 130)])  # the last: more samples than n
def test_the_truth_lies_in_the_interval_as_often_as_is_said(samples: int, held_out: int) -> None:
    """The truth at that n: the mean of the score over many worlds."""
    drawn = [found_in(world, samples, held_out, replicates=30) for world in range(60)]
    every = drawn + [found_in(world, samples, held_out, replicates=2) for world in range(60, 100)]
    for name in drawn[0]:
        value = np.mean([one[name][0] for one in every])
        within = np.mean([one[name][1][0] <= value <= one[name][1][1] for one in drawn])
        assert within >= 0.88, name
        spread = np.std([one[name][0] for one in every])
        width = np.mean([one[name][1][1] - one[name][1][0] for one in drawn])
        assert width < 1.6 * 2 * 1.96 * spread, name  # nor is it bought by intervals that say nothing


def test_halves_of_a_mean_spread_as_the_mean_does() -> None:
    """Of a difference of means the jackknife's interval is the textbook's."""
    random = np.random.default_rng(1)
    ours, real = random.normal(size=80), 3 * random.normal(size=200) + 1
    halves = list(halves_of_both(80, 200, seed=0, replicates=2000))
    assert {len(mine) for mine, _ in halves} == {40}
    assert all(len(set(theirs.tolist())) == 100 for _, theirs in halves)
    values = np.array([ours[mine].mean() - real[theirs].mean() for mine, theirs in halves])
    low, high = jackknife_interval(0.0, values)
    expected = 1.96 * (ours.var(ddof=1) / 80 + real.var(ddof=1) / 200) ** 0.5
    assert (low, high) == pytest.approx((-expected, expected), rel=0.06)


def test_the_interval_of_a_share_is_wilsons() -> None:
    for count, n in ((0, 30), (7, 30), (30, 30)):
        low, high = share_interval(count, n)
        z = stats.norm.ppf(0.975)
        centre, half = count / n + z**2 / 2 / n, z * (count / n * (1 - count / n) / n + (z / 2 / n) ** 2) ** 0.5
        assert (low, high) == pytest.approx(
            ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)), abs=1e-12
        )


def test_no_number_of_images_makes_sure() -> None:
    assert never_sure((1.0, 1.0), 30) == pytest.approx(share_interval(30, 30))
    assert never_sure((0.0, 0.0), 30) == pytest.approx(share_interval(0, 30))
    assert never_sure((-0.1, 0.6), 30) == (0.0, 0.6)
    assert never_sure((0.4, 1.3), 30) == (0.4, 1.0)


def test_the_fewest_images_have_intervals_that_are_numbers() -> None:
    random = np.random.default_rng(2)
    sets = SetFeatures(*(random.normal(size=(n, 5)) for n in (6, 12, 6)), "f", "p")
    scores = [frechet_score(sets, seed=0, provenance={}), kernel_score(sets, seed=0, provenance={})]
    for score in [*scores, *neighbour_scores(sets, seed=0, provenance={})]:
        json.dumps(score.to_json(), allow_nan=False)
        assert score.interval[0] < score.interval[1]
        assert score.interval[0] <= score.value <= score.interval[1]
