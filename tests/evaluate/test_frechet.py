import numpy as np
import pytest
import scipy.linalg

from pipelines.evaluate.frechet import Statistics, distance_of, frechet_distance, frechet_effort, halvings


def real_floor(features: np.ndarray, n: int) -> np.ndarray:
    pairs = halvings(len(features), n, seed=0, splits=30)
    return np.array([frechet_distance(Statistics.of(features[a]), Statistics.of(features[b])) for a, b in pairs])


def normals(n: int, d: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((n, d)) @ random.standard_normal((d, d)) + random.standard_normal(d)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(Statistics.of(a), Statistics.of(b))


def test_statistics_are_numpys() -> None:
    features = normals(50, 7, 0)
    statistics = Statistics.of(features)
    assert statistics.n == 50
    np.testing.assert_allclose(statistics.mean, features.mean(0))
    np.testing.assert_allclose(statistics.covariance, np.cov(features.T))


@pytest.mark.parametrize(("n", "d"), [(40, 3), (500, 64), (20, 64)])  # the last: covariances not of full rank
def test_agrees_with_the_matrix_square_root(n: int, d: int) -> None:
    a, b = normals(n, d, 1), normals(n, d, 2)
    s, t = np.cov(a.T), np.cov(b.T)
    # sqrtm wants full rank; a small ridge moves the root by about its own root, hence the tolerance there.
    ridge = 0.0 if n > d else 1e-9
    root = scipy.linalg.sqrtm((s + ridge * np.eye(d)) @ (t + ridge * np.eye(d)))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root.real)
    assert distance(a, b) == pytest.approx(expected, rel=1e-8 if n > d else 1e-4)


def test_closed_form_of_axis_parallel_gaussians() -> None:
    mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    variance_a, variance_b = np.array([4.0, 0.0, 1.0]), np.array([1.0, 9.0, 1.0])
    a = Statistics(10, mean_a, np.diag(variance_a))
    b = Statistics(10, mean_b, np.diag(variance_b))
    expected = (1 + 9) + ((2 - 1) ** 2 + (0 - 3) ** 2 + 0)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_invariances() -> None:
    a, b = normals(100, 12, 3), normals(80, 12, 4)
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((12, 12)))[0]
    expected = distance(a, b)
    assert distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert distance(a @ rotation + 3, b @ rotation + 3) == pytest.approx(expected, rel=1e-10)
    assert distance(2 * a, 2 * b) == pytest.approx(4 * expected, rel=1e-10)
    assert distance(a, a[::-1]) == pytest.approx(0, abs=1e-10)
    assert distance(a, a + 1) == pytest.approx(12, rel=1e-10)
    assert distance(a[:5], a[:5]) == pytest.approx(0, abs=1e-10)  # five points of twelve dimensions


def test_features_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(ValueError, match="two images or more"):
        Statistics.of(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="finite"):
        Statistics.of(np.array([[0.0, np.nan], [1.0, 2.0]]))


def test_halves_are_disjoint_keyed_and_of_the_size_asked_for() -> None:
    pairs = list(halvings(21, 8, seed=1, splits=6))
    assert len(pairs) == 6
    for first, second in pairs:
        assert len({*first.tolist(), *second.tolist()}) == 16
    assert np.array_equal(pairs[2][0], list(halvings(21, 8, seed=1, splits=3))[2][0])
    assert not np.array_equal(pairs[0][0], pairs[1][0])
    assert not np.array_equal(pairs[0][0], next(halvings(21, 8, seed=2, splits=1))[0])
    with pytest.raises(ValueError, match="do not fit"):
        list(halvings(21, 11, seed=1, splits=1))


def test_the_floor_falls_as_one_over_n() -> None:
    features = normals(4000, 16, 6)
    few, many = (real_floor(features, n) for n in (250, 1000))
    assert few.shape == (30,)
    assert few.mean() / many.mean() == pytest.approx(4, rel=0.15)
    assert np.array_equal(few, real_floor(features, 250))


@pytest.mark.parametrize(("n", "m", "d"), [(40, 40, 3), (20, 30, 64), (70, 90, 64), (30, 200, 64), (10, 10, 300)])
def test_fewer_images_than_features_are_at_the_distance_that_their_covariances_have(n: int, m: int, d: int) -> None:
    a, b = normals(n, d, 1), 1.2 * normals(m, d, 2)
    assert distance_of(a, b) == pytest.approx(distance(a, b), rel=1e-9 if min(n, m) > d else 1e-7)
    assert distance_of(a, a + 1) == pytest.approx(d, rel=1e-9)
    with pytest.raises(ValueError, match="finite"):
        distance_of(np.full((n, d), np.nan), b)


def test_no_more_work_than_the_images_are_worth() -> None:
    assert frechet_effort(1000, 64) == frechet_effort(5000, 64) == (50, 200)
    splits, replicates = frechet_effort(1000, 2048)
    assert 10 <= splits < 50
    assert 20 <= replicates < 200
    assert frechet_effort(20_000, 2048) == (2, 20)
