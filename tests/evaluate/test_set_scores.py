"""Scores of sets of images against other ways of computing them."""

import contextlib
import io

import numpy as np
import prdc
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from pipelines.evaluate.frechet import Statistics, frechet_distance
from pipelines.evaluate.kernel import kernel_distance, kernel_interval, kernel_spread
from pipelines.evaluate.memory import memory, nearest
from pipelines.evaluate.neighbours import COVERAGE, DENSITY, NEIGHBOURS, PRECISION, RECALL, neighbour_terms

Sets = tuple[np.ndarray, np.ndarray]


@pytest.fixture(params=[(700, 700, 64, 0.3), (150, 150, 8, 1.0), (60, 60, 3, 0.0)], ids=str)
def sets(request: pytest.FixtureRequest) -> Sets:
    """Features of two sets that lie apart by so much, neither round nor centred."""
    n, m, width, apart = request.param
    random = np.random.default_rng(n)
    mix = random.normal(size=(width, width)) / width**0.5
    return random.normal(size=(n, width)) @ mix + apart, random.normal(size=(m, width)) @ mix * 1.1


def test_kernel_distance_is_the_mean_over_pairs(sets: Sets) -> None:
    """Binkowski et al., equation 4, pair by pair."""
    a, b = sets
    n, width = a.shape

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (np.einsum("id,jd->ij", x, y) / width + 1) ** 3

    others = ~np.eye(n, dtype=bool)
    expected = kernel(a, a)[others].mean() + kernel(b, b)[others].mean() - 2 * kernel(a, b).mean()
    assert kernel_distance(a, b, seed=1) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_kernel_distance_of_like_sets_is_zero_on_average() -> None:
    random = np.random.default_rng(0)
    values = np.array([kernel_distance(*random.normal(size=(2, 80, 16)), seed=0) for _ in range(200)])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    assert (values < 0).any()


@pytest.mark.parametrize(("apart", "least", "most"), [(0.0, 0.95, 1.0), (0.4, 0.9, 0.99)])
def test_the_kernels_interval_covers_what_it_estimates(apart: float, least: float, most: float) -> None:
    random = np.random.default_rng(1)
    pairs = [(random.normal(size=(80, 16)) + apart, random.normal(size=(80, 16))) for _ in range(300)]
    truth = np.mean([kernel_distance(*pair, seed=0) for pair in pairs])
    found = [kernel_interval(*pair, seed=number, replicates=200) for number, pair in enumerate(pairs)]
    assert least <= np.mean([low <= truth <= high for low, high in found]) <= most


def test_the_chance_of_the_kernels_spread_is_its_own(sets: Sets) -> None:
    before = torch.random.get_rng_state()
    first, second, other = (kernel_spread(*sets, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    assert first > 0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_neighbour_scores_are_those_of_their_authors_own_code(sets: Sets) -> None:
    ours, real = sets
    terms = neighbour_terms(ours, real)
    for k, names in ((3, (PRECISION, RECALL)), (5, (DENSITY, COVERAGE))):
        with contextlib.redirect_stdout(io.StringIO()):
            expected = prdc.compute_prdc(real_features=real, fake_features=ours, nearest_k=k)
        for name in names:
            assert NEIGHBOURS[name] == k
            assert terms[name].mean() == pytest.approx(expected[name], rel=1e-9)
    assert len(terms[PRECISION]) == len(ours)
    assert len(terms[RECALL]) == len(real)


def test_neighbour_scores_of_a_set_against_itself_are_whole() -> None:
    x = np.random.default_rng(3).normal(size=(600, 5))
    assert {name: term.mean() for name, term in neighbour_terms(x, x).items() if name != DENSITY} == {
        PRECISION: 1.0,
        RECALL: 1.0,
        COVERAGE: 1.0,
    }


def test_frechet_distance_is_that_of_torchmetrics(sets: Sets) -> None:
    """To 1e-3, for which its float64 is enough."""
    a, b = sets

    class Given(torch.nn.Module):
        num_features = a.shape[1]

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
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
    assert honest.own_rate == pytest.approx(0.05, abs=0.03)
    assert honest.rate == pytest.approx(0.05, abs=0.03)
    copies = train[:800] + 0.01 * random.normal(size=(800, 12))
    assert memory(nearest(copies, train).distance, apart, seed=0).rate == 1.0
    half = np.concatenate([copies[:400], alike[:400]])
    assert memory(nearest(half, train).distance, apart, seed=0).rate == pytest.approx(0.525, abs=0.03)
