"""The study behind docs/claims.md, at a size that says nothing: that its stages do what they are called."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.claims import study as studies
from benchmarks.claims import table
from benchmarks.claims.cache import Cache
from benchmarks.claims.data import Data, Work
from benchmarks.claims.study import BASELINE, SAMPLERS, USUAL, VARIANTS, Study, Way, compute
from ddpm_core import GaussianDiffusion, NoiseSchedule, bits_per_dim_estimate
from pipelines.data.pixels import to_model
from pipelines.store import Place

WORK = Work(
    images=64,
    channels=(4, 4),
    groups=2,
    batch=16,
    learning_rate=1e-3,
    samples=6,
    feature_images=40,
    feature_epochs=1,
    bits_images=5,
)


def blobs(n: int, seed: int) -> np.ndarray:
    """Bright squares on dark ground, uint8 [n, 8, 8, 1]."""
    rng = np.random.default_rng(seed)
    images = rng.integers(40, size=(n, 8, 8, 1), dtype=np.uint8)
    for image, (x, y) in zip(images, rng.integers(4, size=(n, 2)), strict=True):
        image[y : y + 4, x : x + 4] = 200
    return images


@pytest.fixture(scope="module")
def data() -> Data:
    return Data("blobs", blobs(40, 0), np.arange(40) % 2, blobs(20, 1), np.arange(20) % 2, WORK)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """The sizes that are no part of `Work`."""
    patch = pytest.MonkeyPatch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    usual = Way("ancestral", 4)
    for module, name, value in (
        (studies, "USUAL", usual),
        (table, "USUAL", usual),
        (studies, "CHUNK", 4),
        (studies, "PACE_ROUNDS", 1),
        (studies, "SPLITS", 3),
        (studies.forward, "PIXELS", 4_000),
    ):
        patch.setattr(module, name, value)
    yield
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def study(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """With seeds 0 and 1 computed, samplers at 10 steps."""
    made = Study(data, Cache(Place.of(tmp_path_factory.mktemp("claims"))), images=64, threads=1)
    compute(made, [0, 1], [10])
    return made


def files(study: Study) -> dict[str, bytes]:
    folder = Path(str(study.cache.place))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_stage_that_is_there_is_not_made_again_and_one_that_is_not_is_made_the_same(study: Study) -> None:
    before = files(study)
    compute(study, [0, 1], [10])
    assert files(study) == before
    lost = [name for name in before if not name.startswith(("pace", "forward"))][::3]  # those two hold times
    for name in lost:
        (Path(str(study.cache.place)) / name).unlink()
    compute(study, [0, 1], [10])
    after = files(study)
    assert after.items() <= before.items()
    # What only leads to a result that is there need not be made again.
    assert all(name.startswith(("train", "draw", "features")) for name in before.keys() - after.keys())
    assert any(name in after for name in lost)


@pytest.mark.parametrize("constant", ["PACE_ROUNDS", "PACE_STEPS", "CHUNK"])
def test_what_decides_a_time_is_in_its_key(study: Study, constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = dataclasses.replace(study, cache=dataclasses.replace(study.cache, compute=False))
    assert looking.pace() is not None
    monkeypatch.setattr(studies, constant, 99)
    assert looking.pace() is None


@pytest.mark.parametrize("constant", ["BITS_TIMESTEPS", "BITS_BATCH", "MEASURE_SEED", "EMA_HALF_LIFE", "WARM_UP"])
def test_what_decides_the_bits_is_in_their_key(study: Study, constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = dataclasses.replace(study, cache=dataclasses.replace(study.cache, compute=False))
    assert looking.bits(VARIANTS[BASELINE], 0) is not None
    monkeypatch.setattr(studies, constant, 7)
    assert looking.bits(VARIANTS[BASELINE], 0) is None


def test_variants_are_different_models_that_start_alike(study: Study) -> None:
    weights = {name: study.model(variant, 0).state_dict() for name, variant in VARIANTS.items()}
    told = {name: torch.cat([w.flatten() for w in each.values()]) for name, each in weights.items()}
    assert len({value.numpy().tobytes() for value in told.values()}) == len(VARIANTS)
    seeds = [study.model(VARIANTS[BASELINE], seed).state_dict()["conv_in.weight"] for seed in (0, 1)]
    assert not torch.equal(*seeds)


def test_a_network_without_time_does_not_see_it(study: Study) -> None:
    x = torch.zeros(2, 1, 8, 8)
    blind = study.model(VARIANTS["eps, no time"], 0).eval()
    assert torch.equal(blind(x, torch.tensor([0, 999])), blind(x, torch.tensor([5, 5])))
    told = study.model(VARIANTS["eps"], 0).eval()
    assert not torch.equal(told(x, torch.tensor([0, 999])), told(x, torch.tensor([5, 5])))


def test_bits_are_those_of_the_held_out_images(study: Study, data: Data) -> None:
    got = study.bits(VARIANTS["v"], 0)
    chosen = study._held_out("bits", WORK.bits_images)
    assert all(any((image == other).all() for other in data.held_out) for image in chosen)
    process = GaussianDiffusion(NoiseSchedule.linear(), "v")
    bits = bits_per_dim_estimate(process, study.model(VARIANTS["v"], 0), to_model(chosen), 0, 10)
    assert got["value"] == pytest.approx(bits.mean().item(), rel=1e-6)
    assert got["interval"][0] < got["value"] < got["interval"][1]


def test_the_forward_process_is_the_closed_form(study: Study) -> None:
    found = study.forward(0)
    assert max(found["exact_mean"] + found["exact_variance"]) < 1e-11
    for name in ("signal", "variance"):
        assert all(abs(a) < 5 * b for a, b in zip(found[name], found[f"{name}_error"], strict=True))


def test_samplers_share_their_first_noise_but_not_their_images(study: Study) -> None:
    drawn = [study.drawn(VARIANTS[BASELINE], 0, Way(sampler, 10, variance)) for sampler, variance in SAMPLERS.values()]
    assert len({images.tobytes() for images in drawn if images is not None}) == len(SAMPLERS)


def test_the_tables_say_what_is_there_and_what_is_not(study: Study) -> None:
    looking = dataclasses.replace(study, cache=dataclasses.replace(study.cache, compute=False))
    text = "\n".join(table.tables(looking, range(3)))
    bits = [looking.bits(VARIANTS["v"], seed)["value"] for seed in (0, 1)]
    frechet = [looking.frechet(VARIANTS["v"], seed, studies.USUAL)["value"] for seed in (0, 1)]
    row = next(line for line in text.splitlines() if line.startswith("| v |"))
    for values in (bits, frechet):
        assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} (2 of 3 seeds)" in row
    base = [looking.bits(VARIANTS[BASELINE], seed)["value"] for seed in (0, 1)]
    differences = np.subtract(bits, base)
    assert f"| {differences.mean():.3f} ± {differences.std(ddof=1):.3f} (2 of 3 seeds) |" in row
    assert "| 1000 | – | – | – | – |" in text
    assert USUAL.steps == 100  # of the study itself, which this file makes smaller
