import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, bits_per_dim_estimate
from pipelines.cluster import Cluster
from pipelines.data.pixels import to_model
from pipelines.drawing import Settings, draw
from pipelines.errors import Failed, UserError
from pipelines.evaluate.bits import bits_score, estimate_bits
from pipelines.evaluate.features import FeatureNet
from pipelines.evaluate.scores import Score, comparable
from pipelines.evaluate.sets import (
    SetFeatures,
    frechet_score,
    kernel_score,
    neighbour_scores,
    uniform_noise,
)
from pipelines.evaluate.statistics import floors_at
from pipelines.sections import Sample
from pipelines.store import DamageError, Place
from tests.evaluate.conftest import Digits

KNOWN = {"dataset_digest": "d" * 64, "model_digest": "m" * 64, "sampler": "ddim", "steps": 50}


def of(net: FeatureNet, samples: np.ndarray, digits: Digits, **settings: int) -> Score:
    chosen = {"seed": 0, "splits": 20, "replicates": 30, **settings}
    sets = SetFeatures.of(net, samples, digits.held_out, chosen["seed"])
    return frechet_score(sets, provenance=KNOWN, **chosen)


def test_real_images_are_at_about_one_floor_and_noise_is_far(net: FeatureNet, digits: Digits) -> None:
    score = of(net, digits.train, digits)
    assert 0.6 < score.in_floors < 1.4
    assert score.interval[0] < score.value < score.interval[1]
    assert score.provenance["noise_in_floors"] >= 50
    # The sanity figure is what scoring noise gives.
    noise = uniform_noise((len(digits.held_out) // 2, 8, 8, 1), seed=123)
    assert of(net, noise, digits).in_floors == pytest.approx(score.provenance["noise_in_floors"], rel=0.15)


def test_bad_samples_score_badly(net: FeatureNet, digits: Digits) -> None:
    random = np.random.default_rng(0)
    grainy = (digits.train + random.normal(0, 40, digits.train.shape)).clip(0, 255).astype(np.uint8)
    for samples in (
        grainy,
        digits.train[digits.train_labels > 1],  # two of the ten digits are missing
        255 - digits.train,
        digits.train[:, ::-1].copy(),  # upside down
        np.repeat(digits.train[:40], 10, axis=0),  # collapsed to a few images
    ):
        assert of(net, samples, digits).in_floors > 2


def test_the_score_says_what_it_is_of(net: FeatureNet, digits: Digits) -> None:
    score = of(net, digits.train[:100], digits)
    provenance = score.provenance
    assert provenance["n"] == 100  # also of the halves: the floor is taken at the same n
    assert provenance["features_digest"] == net.digest
    assert provenance["split"] == "held-out"
    assert (provenance["samples"], provenance["held_out"]) == (100, 200)
    assert (provenance["splits"], provenance["replicates"]) == (20, 30)
    assert provenance["floor"] > of(net, digits.train, digits).provenance["floor"]
    assert KNOWN.items() <= provenance.items()
    assert score == of(net, digits.train[:100], digits)
    assert score != of(net, digits.train[:100], digits, seed=1)


def test_floors_are_the_same_for_every_model_and_serve_all(net: FeatureNet, digits: Digits, tmp_path: Path) -> None:
    sets = [SetFeatures.of(net, samples, digits.held_out, seed=3) for samples in (digits.train, 255 - digits.train)]
    here = (8, 8, 1), 3, Place.of(tmp_path), Cluster(None)
    floors, again = (floors_at(one.n, one.real, net, *here) for one in sets)
    assert floors == again
    alone, given = (
        [make(sets[0], seed=3, provenance=KNOWN, **words) for make in (frechet_score, kernel_score)]
        + neighbour_scores(sets[0], seed=3, provenance=KNOWN, replicates=20, **words)
        for words in ({}, {"floors": floors})
    )
    assert alone == given
    assert {score.name: score.provenance["floor"] for score in given} == floors.floors
    assert given[1].provenance["subset"] == sets[0].n // 2
    with pytest.raises(ValueError, match="floors at n"):
        frechet_score(SetFeatures.of(net, digits.train[:50], digits.held_out, 3), seed=3, provenance={}, floors=floors)


def test_its_bits_do_not_depend_on_threads_and_it_leaves_them_alone(net: FeatureNet, digits: Digits) -> None:
    expected, threads = of(net, digits.train, digits, splits=3), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert of(net, digits.train, digits, splits=3) == expected
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_too_few_images_are_refused(net: FeatureNet, digits: Digits) -> None:
    with pytest.raises(UserError, match=r"too few .* sample\.n"):
        of(net, digits.train[:1], digits)
    with pytest.raises(UserError, match=r"data\.held_out"):
        SetFeatures.of(net, digits.train, digits.held_out[:3], seed=0)


def test_a_score_survives_json(net: FeatureNet, digits: Digits) -> None:
    score = of(net, digits.train, digits, splits=2)
    assert Score.from_json(json.loads(json.dumps(score.to_json()))) == score
    with pytest.raises(DamageError, match="format 2, not 1"):
        Score.from_json({**score.to_json(), "format": 2})
    for damaged in ([], {**score.to_json(), "interval": [1]}, {"format": 1}):
        with pytest.raises(DamageError):
            Score.from_json(damaged)


def test_no_infinity_reaches_json(net: FeatureNet, digits: Digits) -> None:
    same = np.repeat(digits.held_out[:1], 10, axis=0)
    sets = SetFeatures.of(net, digits.train[:5], same, seed=0)
    score = frechet_score(sets, seed=0, provenance={}, splits=2, replicates=2)
    json.dumps(score.to_json(), allow_nan=False)
    assert score.in_floors > 1e6


def frechet(**provenance: object) -> Score:
    deciding = {"n": 9, "features_digest": "f", "preprocessing": "p", "split": "held-out", "dataset_digest": "d"}
    return Score("frechet", 1.0, (0.5, 1.5), {**deciding, "floor": 0.5, **provenance})


def test_scores_of_different_things_are_not_comparable() -> None:
    assert comparable(frechet(model_digest="a", steps=50, seed=1), frechet(model_digest="b", steps=10, floor=3)) == []
    for field in ("n", "features_digest", "preprocessing", "split", "dataset_digest"):
        assert comparable(frechet(), frechet(**{field: "other"})) == [field]
    assert comparable(frechet(n=1, split="a"), frechet(n=2, split="b")) == ["n", "split"]
    unknown = Score("frechet", 1.0, (0.5, 1.5), {"n": 9})
    assert comparable(unknown, unknown) == ["features_digest", "preprocessing", "split", "dataset_digest"]
    assert comparable(frechet(), Score("bits_per_dim", 1.0, (0.5, 1.5), frechet().provenance)) == ["name"]


def test_in_floors() -> None:
    assert frechet().in_floors == 2
    with pytest.raises(ValueError, match="no floor"):
        _ = Score("bits_per_dim", 1.0, (0.5, 1.5), {}).in_floors


def test_bits_are_the_cores_whatever_the_batch(digits: Digits) -> None:
    process = GaussianDiffusion(NoiseSchedule.cosine(20))

    def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return 0.5 * x

    images = digits.held_out[:7]
    bits = estimate_bits(process, model, images, seed=3, timesteps_per_image=4, batch=3)
    assert bits.shape == (7,)
    expected = bits_per_dim_estimate(process, model, to_model(images), 3, 4).numpy()
    np.testing.assert_allclose(bits, expected, rtol=1e-6)
    np.testing.assert_allclose(estimate_bits(process, model, images[::-1].copy(), 3, 4), expected[::-1], rtol=1e-6)


def test_bits_score_is_mean_and_interval() -> None:
    estimates = np.random.default_rng(0).normal(3.0, 0.4, size=400)
    images = np.arange(400, dtype=np.uint16).view(np.uint8).reshape(400, 1, 2, 1)  # all of them different
    score = bits_score(estimates, images, seed=7, provenance=KNOWN)
    assert score.name == "bits_per_dim"
    assert score.value == pytest.approx(estimates.mean())
    half = 1.96 * estimates.std(ddof=1) / 20
    assert score.interval == pytest.approx((score.value - half, score.value + half))
    assert score.provenance == {
        **KNOWN,
        "n": 400,
        "preprocessing": "uint8 / 127.5 - 1, at the data's own size",
        "split": "held-out",
        "seed": 7,
    }
    twice = bits_score(np.tile(estimates, 2), np.tile(images, (2, 1, 1, 1)), seed=7, provenance=KNOWN)
    assert twice.interval == pytest.approx(score.interval)  # a copy shares its noise, and says nothing new


def test_a_network_that_answers_nan_has_no_score() -> None:
    process, images = GaussianDiffusion(NoiseSchedule.cosine(8)), np.zeros((2, 4, 4, 1), dtype=np.uint8)
    with pytest.raises(Failed, match="it diverged, and has no bits/dim"):
        estimate_bits(process, lambda x_t, timestep: x_t * np.nan, images, 0, 4)
    unet = UNet(UNetConfig(channels=(4,), groups=2))
    with torch.no_grad():
        unet.conv_out.bias.fill_(np.nan)
    settings = Settings.of(Sample(n=2, steps=4))
    with pytest.raises(Failed, match="nothing was drawn, the images hold NaN or infinities: the network"):
        draw(process, unet, 4, settings, range(2))
