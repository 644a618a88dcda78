"""How well an order shuffles: each figure against what counting, or drawing, makes it."""

import itertools
import time

import numpy as np
import pytest

from pipelines.data import shuffle
from pipelines.data.order import Order


def qualities(order: Order, batch: int, labels: np.ndarray | None = None) -> dict[str, float]:
    """Of an order, with a label for each place on disk."""
    return {figure.name: figure.quality for figure in measured(order, batch, labels).figures}


def measured(order: Order, batch: int, labels: np.ndarray | None = None) -> shuffle.Shuffle:
    if labels is None:
        return shuffle.measure(order, batch)
    shards = np.split(labels, np.cumsum(order.shard_sizes)[:-1])
    return shuffle.measure(order, batch, np.bincount(labels).tolist(), lambda number: shards[number])


@pytest.mark.parametrize("counts", [(1,), (3, 3), (1, 2, 4), (5, 1, 1), (2, 2, 2)])
def test_the_expected_number_of_kinds_is_that_over_all_draws(counts: tuple[int, ...]) -> None:
    members = [kind for kind, count in enumerate(counts) for _ in range(count)]
    for batch in range(1, len(members) + 1):
        draws = [len({members[i] for i in drawn}) for drawn in itertools.combinations(range(len(members)), batch)]
        assert shuffle.expected_distinct(np.array(counts), batch) == pytest.approx(np.mean(draws), rel=1e-12)


def test_the_expected_number_of_kinds_of_many() -> None:
    assert shuffle.expected_distinct(np.full(100_000, 10_000), 1) == pytest.approx(1, rel=1e-9)
    with_replacement = 1e5 * (1 - (1 - 1e-5) ** 64)  # of so many, nearly the same
    assert shuffle.expected_distinct(np.full(100_000, 10_000), 64) == pytest.approx(with_replacement, rel=1e-5)


@pytest.mark.parametrize("sizes", [(100,) * 30, (500, 10, 300, 1), (50,) * 3])
def test_a_window_over_all_shards_is_as_good_as_uniform(sizes: tuple[int, ...]) -> None:
    labels = np.arange(sum(sizes)) * 5 // sum(sizes)  # sorted by class
    found = measured(Order(sizes, len(sizes), 0, "d"), 20, labels)
    assert found.advice is None
    assert {figure.name for figure in found.figures} == {"shards", "displacement", "classes"}
    for figure in found.figures:
        assert figure.quality == pytest.approx(1, abs=0.12), figure


def test_what_is_found_is_what_the_batches_hold() -> None:
    """Counted here over whole epochs, which the measure samples."""
    order = Order((100,) * 40, 4, 3, "d")
    labels = np.arange(4000) // 1000
    batches = order.locate(np.arange(32 * 4000))[0].reshape(-1, 50)
    figures = {figure.name: figure for figure in measured(order, 50, labels).figures}
    assert figures["shards"].found == pytest.approx(np.mean([len(set(b)) for b in batches.tolist()]), rel=0.02)
    assert figures["shards"].uniform == pytest.approx(40 * (1 - (1 - 1 / 40) ** 50), rel=0.01)
    counts = np.stack([np.bincount(labels[batch * 100], minlength=4) for batch in batches])
    # Of a uniform batch the squared deviations add up to 50 x 4 x 1/4 x 3/4, but for what is drawn without return.
    uniform = 37.5 * (4000 - 50) / 3999
    deviation = ((counts - 12.5) ** 2).sum(axis=1).mean()
    assert figures["classes"].quality == pytest.approx(uniform / deviation, rel=0.15)
    places = np.arange(4000)
    shards, rows = order.locate(np.arange(32 * 4000))
    moved = np.abs((shards * 100 + rows).reshape(32, 4000) - places).mean() / 4000
    assert figures["displacement"].found == pytest.approx(moved, rel=0.02)
    assert figures["displacement"].uniform == pytest.approx(1 / 3, rel=1e-3)


def test_the_advice_helps() -> None:
    labels = np.arange(60_000) // 6000
    poor = measured(Order((100,) * 600, 4, 0, "d"), 64, labels)
    assert poor.advice is not None
    assert poor.advice.startswith("the classes of a batch vary as in a uniform batch of 4: raise data.window from 4 to")
    window = int(poor.advice.split()[-1])
    assert window < 600
    assert qualities(Order((100,) * 600, window, 0, "d"), 64, labels)["classes"] > 0.7
    mixed = measured(Order((100,) * 600, 4, 0, "d"), 64, np.random.default_rng(0).integers(0, 10, 60_000))
    assert mixed.advice is not None
    assert "its classes are well mixed" in mixed.advice
    window = int(mixed.advice.split()[-1])
    assert qualities(Order((100,) * 600, window, 0, "d"), 64)["shards"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (3,), (2, 5)])
def test_splits_smaller_than_a_batch(sizes: tuple[int, ...]) -> None:
    found = measured(Order(sizes, 1, 0, "d"), 64, np.arange(sum(sizes)) % 2)
    assert found.batch == sum(sizes)
    assert found.figures[0].quality == pytest.approx(1)
    assert all(np.isfinite(figure.quality) for figure in found.figures)


def test_one_class_has_no_spread() -> None:
    assert "classes" not in qualities(Order((10, 10), 1, 0, "d"), 5, np.zeros(20, dtype=int))


def test_a_billion_images_are_measured_in_a_moment() -> None:
    order = Order((10_000,) * 100_000, 4, 0, "d")
    asked = []

    def labels_of(shard: int) -> np.ndarray:
        asked.append(shard)
        return np.full(10_000, shard * 1000 // 100_000)

    began = time.perf_counter()
    found = shuffle.measure(order, 64, [10**6] * 1000, labels_of)
    assert time.perf_counter() - began < 5  # measured 0.3
    assert len(asked) == len(set(asked)) <= 512
    shards, displacement, classes = found.figures
    assert shards.quality == pytest.approx(4 / 64, rel=0.05)
    assert displacement.quality == pytest.approx(1, abs=0.02)
    assert classes.quality == pytest.approx(4 / 64, rel=0.2)
