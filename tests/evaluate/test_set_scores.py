"""Scores of sets of images against other ways of computing them."""

import contextlib
import io

import numpy as np
import prdc
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pipelines.evaluate.chance import Draw
from pipelines.evaluate.frechet import Statistics, frechet_distance
from pipelines.evaluate.kernel import kernel_distance, kernel_distances, kernel_spread, subset_size
from pipelines.evaluate.memory import memory, nearest
from pipelines.evaluate.neighbours import COVERAGE, DENSITY, NEIGHBOURS, PRECISION, RECALL, neighbour_values

Sets = tuple[np.ndarray, np.ndarray]


@pytest.fixture(params=[(700, 700, 64, 0.3), (150, 150, 8, 1.0), (60, 60, 3, 0.0)], ids=str)
def sets(request: pytest.FixtureRequest) -> Sets:
    """Features of two sets that lie apart by so much, neither round nor centred."""
    n, m, width, apart = request.param
    random = np.random.default_rng(n)
    mix = random.normal(size=(width, width)) / width**0.5
    return random.normal(size=(n, width)) @ mix + apart, random.normal(size=(m, width)) @ mix * 1.1


class Given(torch.nn.Module):
    """Takes features, not images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def some_of(sets: Sets) -> list[Draw]:
    """All of both, and subsets of several sizes."""
    random = np.random.default_rng(7)
    sizes = [len(x) for x in sets]
    parts = [tuple(random.permutation(size)[: size // part] for size in sizes) for part in (2, 4, 2)]
    return [tuple(np.arange(size) for size in sizes), *parts]


def test_kernel_distance_is_the_mean_over_pairs(sets: Sets) -> None:
    """Binkowski et al., equation 4, pair by pair."""
    a, b = sets
    n, width = a.shape

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (np.einsum("id,jd->ij", x, y) / width + 1) ** 3

    others = ~np.eye(n, dtype=bool)
    expected = kernel(a, a)[others].mean() + kernel(b, b)[others].mean() - 2 * kernel(a, b).mean()
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_kernel_distance_of_like_sets_is_zero_on_average() -> None:
    random = np.random.default_rng(0)
    values = np.array([kernel_distance(*random.normal(size=(2, 80, 16))) for _ in range(200)])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    assert (values < 0).any()


def test_kernel_distance_is_that_of_torchmetrics(sets: Sets) -> None:
    metric = KernelInceptionDistance(Given(sets[0].shape[1]), subsets=1, subset_size=len(sets[0]))
    for features, real in zip(sets, (True, False), strict=True):
        metric.update(torch.from_numpy(features), real=real)
    assert kernel_distance(*sets) == pytest.approx(float(metric.compute()[0]), rel=1e-4, abs=1e-5)


def test_kernel_distances_of_subsets_are_those_of_the_sets_that_they_are(sets: Sets) -> None:
    draws = some_of(sets)
    expected = [kernel_distance(*(x[rows] for x, rows in zip(sets, draw, strict=True))) for draw in draws]
    assert kernel_distances(*sets, draws) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    with pytest.raises(ValueError, match="two images or more"):
        kernel_distances(*sets, [(np.arange(1), np.arange(5))])


def test_the_chance_of_the_kernels_spread_is_its_own(sets: Sets) -> None:
    before = torch.random.get_rng_state()
    first, second, other = (kernel_spread(*sets, seed=seed, size=30) for seed in (1, 1, 2))
    assert first == second != other
    assert first > 0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [subset_size(n) for n in (3, 700, 9000)] == [2, 350, 1000]


def test_neighbour_scores_are_those_of_their_authors_own_code_for_all_images_and_for_some(sets: Sets) -> None:
    draws = some_of(sets)
    found = neighbour_values(*sets, draws)
    for number, draw in enumerate(draws):
        ours, real = (x[rows] for x, rows in zip(sets, draw, strict=True))
        for k, names in ((3, (PRECISION, RECALL)), (5, (DENSITY, COVERAGE))):
            with contextlib.redirect_stdout(io.StringIO()):
                expected = prdc.compute_prdc(real_features=real, fake_features=ours, nearest_k=k)
            for name in names:
                assert NEIGHBOURS[name] == k
                assert found[name][number] == pytest.approx(expected[name], rel=1e-9)


def everything(*sets: np.ndarray) -> list[Draw]:
    return [tuple(np.arange(len(x)) for x in sets)]


def test_neighbour_scores_of_a_set_against_itself_are_whole() -> None:
    x = np.random.default_rng(3).normal(size=(600, 5))
    found = neighbour_values(x, x, everything(x, x))
    assert [found[name] for name in (PRECISION, RECALL, COVERAGE)] == [1.0, 1.0, 1.0]


def test_images_that_are_almost_alike_are_told_apart() -> None:
    """Far from the origin, where inner products would round their distances away."""
    random = np.random.default_rng(8)
    real = 1e4 + 1e-5 * random.normal(size=(60, 4))
    ours = real[:40].mean(0) + 2e-5 * random.normal(size=(50, 4))
    radii = np.sort(np.sqrt(((real[:, None] - real) ** 2).sum(-1)), axis=1)
    apart = np.sqrt(((ours[:, None] - real) ** 2).sum(-1))
    found = neighbour_values(ours, real, everything(ours, real))
    assert found[PRECISION] == pytest.approx((apart <= radii[:, 3]).any(1).mean())
    assert found[DENSITY] == pytest.approx((apart <= radii[:, 5]).sum(1).mean() / 5)
    assert 0 < found[PRECISION][0] < 1


def test_images_of_which_all_are_copies_lie_in_each_others_balls() -> None:
    same = np.full((200, 6), 3.0)
    found = neighbour_values(same, same, everything(same, same))
    assert [found[name] for name in (PRECISION, RECALL, COVERAGE)] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="two images or more"):
        neighbour_values(same, same[:1], everything(same, same[:1]))


def test_frechet_distance_is_that_of_torchmetrics(sets: Sets) -> None:
    """To 1e-3, for which its float64 is enough."""
    a, b = sets
    metric = FrechetInceptionDistance(feature=Given(a.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    assert frechet_distance(Statistics.of(a), Statistics.of(b)) == pytest.approx(float(metric.compute()), rel=1e-3)


@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_nearest_is_that_of_all_pairs(kind: str) -> None:
    random = np.random.default_rng(4)
    if kind == "pixels":
        images, train = (random.integers(0, 256, (n, 6, 6, 1), dtype=np.uint8) for n in (300, 9000))
        images[7] = train[8500]
    else:
        images, train = random.normal(size=(300, 20)) + 30, random.normal(size=(9000, 20)) + 30
        images[7] = train[8500] + 1e-9
    found = nearest(images, train)
    flat = [x.reshape(len(x), -1).astype(np.float64) for x in (images, train)]
    for row in (0, 7, 123, 299):
        distances = np.sqrt(((flat[0][row] - flat[1]) ** 2).sum(1))
        assert found.index[row] == distances.argmin()
        assert found.distance[row] == pytest.approx(distances.min(), rel=1e-12, abs=1e-12)
    assert found.index[7] == 8500


def test_memory_of_images_like_the_held_out_ones_is_theirs_and_that_of_copies_is_whole() -> None:
    random = np.random.default_rng(5)
    train, held_out, alike = (random.normal(size=(n, 12)) for n in (2000, 800, 800))
    apart = nearest(held_out, train).distance
    honest = memory(nearest(alike, train).distance, apart, seed=0)
    assert honest.threshold == pytest.approx(np.quantile(apart, 0.05, method="weibull"))
    assert honest.own_rate == pytest.approx(0.05, abs=0.005)
    assert honest.rate == pytest.approx(0.05, abs=0.03)
    assert honest.interval[0] <= 0.05 <= honest.interval[1]
    copies = train[:800] + 0.01 * random.normal(size=(800, 12))
    caught = memory(nearest(copies, train).distance, apart, seed=0)
    assert caught.rate == caught.interval[1] == 1.0
    assert 0.99 < caught.interval[0] < 1.0
    half = np.concatenate([copies[:400], alike[:400]])
    assert memory(nearest(half, train).distance, apart, seed=0).rate == pytest.approx(0.525, abs=0.03)


def test_held_out_images_are_near_as_often_as_is_said_however_few_they_are() -> None:
    random = np.random.default_rng(6)
    found = [memory(random.gamma(8, size=20), random.gamma(8, size=40), seed) for seed in range(200)]
    assert np.mean([one.rate for one in found]) == pytest.approx(0.05, abs=0.01)
    assert np.mean([one.own_rate for one in found]) == pytest.approx(0.05, abs=0.003)
    none = memory(np.full(50, 100.0), random.gamma(8, size=40), seed=0)
    assert none.rate == none.interval[0] == 0.0
    assert none.interval[1] > 0.05
