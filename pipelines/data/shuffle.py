"""How well an order shuffles: what its batches hold, against those of a uniform shuffle of the whole split.

Windows of a few shards keep reads local, and the price is that a batch sees a few shards only. Three figures say how
high it is, each of them 1.0 where the order is as good as a uniform shuffle. Measured on a sample of batches of fixed
size, so that it takes as long for 10^9 images as for 10^6.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.data.order import Ints, Order

_EPOCHS = 32
"""The first ones are looked at: in one alone, a few large shards may happen to lie well or badly."""
_BATCHES = 256
"""Batches that are looked at, evenly spaced over the epochs."""
_PLACES = 2048
"""Images of each epoch whose way from disk is measured."""
_LABELLED_SHARDS = 512
"""Most shards whose labels are asked for."""
_GOOD_SHARDS, _GOOD_CLASSES = 0.5, 0.8
"""Below these there is advice."""


_SHARDS = "shards that the images of a batch come from"
_DISPLACEMENT = "mean way of an image between its place on disk and in training, as a share of the epoch"
_CLASSES = "images of the uniformly drawn batch whose classes vary as much"


@dataclass(frozen=True)
class Figure:
    """One measure of an order, beside what it is for a uniform shuffle; larger is better."""

    name: str
    found: float
    uniform: float
    meaning: str
    """What `found` and `uniform` count."""

    @property
    def quality(self) -> float:
        """1.0: as good as a uniform shuffle."""
        return self.found / self.uniform if self.uniform else 1.0

    def to_json(self) -> dict[str, Any]:
        return {"quality": self.quality, "found": self.found, "uniform": self.uniform, "meaning": self.meaning}


@dataclass(frozen=True)
class Shuffle:
    """What was found of an order with batches of `batch` images."""

    window: int
    seed: int
    batch: int
    figures: tuple[Figure, ...]
    advice: str | None
    """One line, where it is poor."""

    def to_json(self) -> dict[str, Any]:
        figures = {figure.name: figure.to_json() for figure in self.figures}
        return {"window": self.window, "seed": self.seed, "batch": self.batch, **figures, "advice": self.advice}


def measure(
    order: Order,
    batch: int,
    class_counts: Sequence[int] = (),
    labels_of: Callable[[int], Ints] | None = None,
) -> Shuffle:
    """Measure an order in batches of `batch` images (all of them, where there are fewer).

    `class_counts` are the images of each class in the whole split, `labels_of(shard)` the class of each row of a
    shard, 0..len(class_counts) - 1; it is asked for at most some 500 shards.
    """
    batch = min(batch, order.n)
    starts, epochs = _sampled_batches(order.n, batch)
    shards, rows = order.locate((epochs * order.n + starts)[:, None] + np.arange(batch))
    figures = [_shards_a_batch(order, shards), _displacement(order)]
    if labels_of is not None and sum(count > 0 for count in class_counts) > 1:
        figures.append(_class_balance(class_counts, labels_of, shards, rows))
    return Shuffle(order.window, order.seed, batch, tuple(figures), _advice(order, batch, figures))


def expected_distinct(counts: Ints, batch: int) -> float:
    """Kinds that `batch` draws without replacement show on average, of kinds with `counts` members each [K].

    A kind of n members of N is missed with probability C(N - n, batch) / C(N, batch).
    """
    sizes, kinds = np.unique(np.asarray(counts, dtype=np.int64), return_counts=True)
    total = int((sizes * kinds).sum())
    # The product of (N - n - i) / (N - i) over the draws i; beyond the members that are left it is 0.
    missed = np.zeros(len(sizes))
    for draw in range(batch):
        left = np.maximum(total - sizes - draw, 0)
        with np.errstate(divide="ignore"):
            missed += np.log(left / (total - draw))
    return float((kinds * -np.expm1(missed)).sum())


def _sampled_batches(n: int, batch: int) -> tuple[Ints, Ints]:
    """First position within its epoch, and epoch, of the batches to look at; no batch straddles epochs."""
    per_epoch = n // batch
    total = per_epoch * _EPOCHS
    looked_at = min(total, _BATCHES)
    numbers = np.arange(looked_at) * total // looked_at
    return numbers % per_epoch * batch, numbers // per_epoch


def _shards_a_batch(order: Order, shards: Ints) -> Figure:
    ordered = np.sort(shards, axis=1)
    found = float((np.diff(ordered, axis=1) != 0).sum(axis=1).mean()) + 1
    uniform = expected_distinct(order.shard_sizes, shards.shape[1])
    return Figure("shards", found, uniform, _SHARDS)


def _displacement(order: Order) -> Figure:
    """Mean distance between an image's place on disk and in the epoch, as a share of the epoch."""
    n = order.n
    places = np.arange(n) if n <= _PLACES else np.random.default_rng(0).integers(0, n, _PLACES)
    before = np.cumsum(order.shard_sizes) - order.shard_sizes
    means = []
    for epoch in range(_EPOCHS):
        shards, rows = order.locate(epoch * n + places)
        means.append(float(np.abs(before[shards] + rows - places).mean()))
    # A uniform permutation moves by (N^2 - 1) / 3N on average.
    uniform = (1 - 1 / n**2) / 3
    return Figure("displacement", float(np.mean(means)) / n, uniform, _DISPLACEMENT)


def _class_balance(class_counts: Sequence[int], labels_of: Callable[[int], Ints], shards: Ints, rows: Ints) -> Figure:
    """Size of the uniform batch whose numbers of each class vary as much as those of the order's batches.

    The squared deviations of the numbers from their means, summed over the classes, fall as 1 / size for shares; for
    a uniform batch of b of N their expectation is b (N - b) / (N - 1) sum p (1 - p), of the multivariate
    hypergeometric distribution.
    """
    known: set[int] = set()
    chosen: list[int] = []
    # In random order, for the shards may run out before the batches.
    for number in np.random.default_rng(0).permutation(len(shards)).tolist():
        more = known | set(shards[number].tolist())
        if chosen and len(more) > _LABELLED_SHARDS:
            break
        known = more
        chosen.append(number)
    shards, rows = shards[chosen], rows[chosen]
    labels = np.empty_like(shards)
    for shard in sorted(known):
        here = shards == shard
        labels[here] = labels_of(shard)[rows[here]]
    batch, total = shards.shape[1], sum(class_counts)
    share = np.asarray(class_counts) / total
    counts = np.stack([np.bincount(row, minlength=len(share)) for row in labels])
    found = float(((counts - batch * share) ** 2).sum(axis=1).mean())
    uniform = batch * float((share * (1 - share)).sum()) * (total - batch) / (total - 1)
    return Figure("classes", batch * uniform / found if found else float(batch), float(batch), _CLASSES)


def _advice(order: Order, batch: int, figures: Sequence[Figure]) -> str | None:
    quality = {figure.name: figure.quality for figure in figures}
    shards, classes = len(order.shard_sizes), quality.get("classes", 1.0)
    if order.window >= shards:
        return None
    if classes < _GOOD_CLASSES:
        # The excess of the variance is that of drawing `window` shards: it falls as 1 / window.
        enough = order.window * (1 / classes - 1) / (1 / _GOOD_CLASSES - 1)
        why = f"the classes of a batch vary as in a uniform batch of {classes * batch:.0f}"
    elif quality["shards"] < _GOOD_SHARDS:
        enough = _window_for(shards, batch, _GOOD_SHARDS * figures[0].uniform)
        why = f"a batch has images of {figures[0].found:.1f} shards only"
        if "classes" in quality:
            why += "; its classes are well mixed, so it matters where neighbours on disk are alike in other ways"
    else:
        return None
    return f"{why}: raise data.window from {order.window} to about {min(shards, math.ceil(enough))}"


def _window_for(shards: int, batch: int, wanted: float) -> int:
    """Smallest window of equal shards whose batches have images of `wanted` shards on average."""
    low, high = 1, shards
    while low < high:
        middle = (low + high) // 2
        if middle * -math.expm1(batch * math.log1p(-1 / middle) if middle > 1 else -math.inf) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low
