"""Held-out scores along the way: the same whoever takes them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from ddpm_core import bits_per_dim_estimate, noise
from pipelines.build import build_model, build_process
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.data.pixels import to_model
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.evaluate.chance import choose_images
from pipelines.sections import Plateau
from pipelines.store import Place
from pipelines.train import driver, pace
from pipelines.train.checkpoint import EMA
from pipelines.train.end import awaited_scores
from pipelines.train.loop import train
from pipelines.train.pace import SCORING_SHARE, Pace
from pipelines.train.run import Run, check_trainable
from pipelines.train.scores import HeldOutScore, Scores, best, patience_ran_out
from pipelines.train.scoring import Scoring
from pipelines.unused import without_effect
from tests.conftest import tiny_spec
from tests.train.train_helpers import SCORE, TRAIN, scored_spec, trained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = Place.of(tmp_path_factory.mktemp("data") / "dataset")
    return ingest("digits", place, image_size=8, channels=1, held_out=0.4, shard_images=100)


@pytest.fixture(scope="module")
def scored(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """20 steps of 32 images, scored after 160, 320, 480 and 640 of them."""
    return trained(scored_spec(keep_checkpoints=9), dataset, tmp_path_factory.mktemp("scored"))


def timeless(score: HeldOutScore) -> HeldOutScore:
    return dataclasses.replace(score, seconds=0.0, time_ms=0)


def test_scores_are_taken_on_the_clock_of_images_each_with_its_checkpoint_and_picture(scored: Run) -> None:
    assert scored.scores.steps() == [5, 10, 15, 20] == scored.checkpoints.steps()
    assert [score.images for score in scored.scores.all()] == [160, 320, 480, 640]
    pictures = {scored.scores.picture(step).read() for step in scored.scores.steps()}
    assert len(pictures) == 4
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    first, last = scored.scores.read(5).bits_per_dim, scored.scores.read(20).bits_per_dim
    assert first is not None
    assert last is not None
    assert last < first  # it learns


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_score_is_the_same_bits_however_many_share_it(dataset: Dataset, scored: Run, ranks: int) -> None:
    weights = safetensors.torch.load(scored.checkpoints.at(10).read_folder(EMA)[EMA])
    parts = [Scoring(scored_spec(), dataset, torch.device("cpu")).work(weights, rank, ranks) for rank in range(ranks)]
    assert all(parts)
    score, grid = Scoring(scored_spec(), dataset, torch.device("cpu")).score(parts, 10, 0.0)
    assert timeless(score) == timeless(scored.scores.read(10))
    assert grid == scored.scores.picture(10).read()


def test_a_score_is_what_the_core_says_of_the_average_on_held_out_images(dataset: Dataset, scored: Run) -> None:
    spec, score = scored_spec(), scored.scores.read(20)
    images, _ = Reader(dataset.split("held-out")).read_all()
    x0 = to_model(images[choose_images(len(images), 40, spec.seed)])
    process, unet = build_process(spec.diffusion), build_model(spec).eval()
    unet.load_state_dict(safetensors.torch.load(scored.checkpoints.at(20).read_folder(EMA)[EMA]))
    bits = bits_per_dim_estimate(process, unet, x0, spec.seed, 4)
    assert score.bits_per_dim == pytest.approx(float(bits.mean()), rel=1e-6)
    assert score.scored == 40

    # Of the third quarter of the 50 timesteps, 26..37: the network's error there, at draws of its own.
    errors = []
    with torch.no_grad():
        for t in range(26, 38):
            eps = noise.normal([noise.key(1, "test", t)], x0.shape)[0]
            x_t = process.q_sample(x0, torch.full((len(x0),), t), eps)
            errors.append(float((unet(x_t, torch.full((len(x0),), t - 1)) - eps).square().mean()))
    assert score.error[2] == pytest.approx(float(np.mean(errors)), rel=0.15)
    log_snr = process.schedule.log_snr
    assert score.log_snr == pytest.approx([float(log_snr[t - 1]) for t in (1, 12, 25, 37, 50)])


def of(*bits: float | None) -> list[HeldOutScore]:
    blank = {
        "low": None,
        "high": None,
        "error": (),
        "log_snr": (),
        "scored": 1,
        "asked": (1, 1),
        "seconds": 0.0,
        "time_ms": 0,
    }
    return [HeldOutScore(step=k, images=100 * k, bits_per_dim=bit, **blank) for k, bit in enumerate(bits, start=1)]


@pytest.mark.parametrize(
    ("bits", "least_gain", "ends_at"),
    [
        ((5.0, 4.0, 3.0, 2.0), 0.0, None),
        ((5.0, 4.0, 4.5, 4.5), 0.0, 4),  # 200 images after the second
        ((5.0, 4.0, 4.5, 3.9, 4.0, 4.0), 0.0, 6),
        ((5.0, 4.9, 4.8, 4.7), 0.5, 3),  # gains, but small ones
        ((5.0, 4.8, 4.5, 4.4), 0.5, 3),  # 0.5 below the best before is not more than 0.5 below
        ((5.0, 4.8, 4.4, 4.3, 4.2), 0.5, 5),
        ((None, None, 5.0), 0.0, 2),  # nothing but what is not finite is no gain
        ((5.0, None, 4.0, 3.0), 0.0, None),
        ((), 0.0, None),
    ],
)
def test_patience_runs_out_after_so_many_images_without_a_gain(
    bits: tuple[float | None, ...], least_gain: float, ends_at: int | None
) -> None:
    plateau = Plateau(patience_images=200, least_gain=least_gain)
    assert patience_ran_out(of(*bits), plateau) == ends_at
    # What comes later changes nothing: scores may be taken behind the training.
    if ends_at is not None:
        assert patience_ran_out([*of(*bits), *of(*bits, *[0.0] * 5)[len(bits) :]], plateau) == ends_at


def test_the_best_score_is_the_first_of_the_least() -> None:
    found = best(of(None, 3.0, 2.0, 2.0, 4.0))
    assert found is not None
    assert found.step == 3
    assert best(of(None)) is None
    assert [score.step for score in of(0.0, -1.0) if score == best(of(0.0, -1.0))] == [2]


def test_the_best_checkpoint_is_kept(dataset: Dataset, tmp_path: Path) -> None:
    assert kept_of_scores([1.0, 0.5, 2.0, 3.0], dataset, tmp_path) == [10, 20]


def test_a_best_that_comes_last_leaves_no_other(dataset: Dataset, tmp_path: Path) -> None:
    assert kept_of_scores([4.0, 3.0, 2.0, 1.0], dataset, tmp_path) == [20]


def kept_of_scores(bits: list[float], dataset: Dataset, root: Path) -> list[int]:
    """Steps whose checkpoints are kept of a run with these scores when its driver is done."""
    spec = scored_spec(keep_best=True, keep_checkpoints=1, images=640)
    run = Run.of(spec, dataset.digest, Place.of(root))
    worse = iter(bits)
    commit = Scores.commit

    def scored(self: Scores, score: HeldOutScore, grid: bytes) -> None:
        commit(self, dataclasses.replace(score, bits_per_dim=next(worse)), grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scores, "commit", scored)
        train(spec, dataset, run)
    driver.thin(run, spec.train)
    return run.checkpoints.steps()


def test_without_an_interval_ranks_score_in_a_twentieth_of_the_time(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    spec = tiny_spec(train={**TRAIN, "checkpoint_every": 1, "images": 32_000})
    clock = Pace(Run(Place.of(tmp_path)), spec.train, spent=0.0, scoring_calls=960)
    scores = 0
    for step in range(1, 1001):
        if clock.word(step) == "score":
            scores += 1
            now += 3.0
            clock.scored(3.0)
        now += 0.1
    total = now - 1000.0
    assert 3.0 * scores <= SCORING_SHARE * total
    assert scores >= 1


def test_minutes_between_checkpoints_are_kept_whatever_the_steps(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    spec = tiny_spec(train={**TRAIN, "checkpoint_every": 1000, "checkpoint_minutes": 1.0})
    clock = Pace(Run(Place.of(tmp_path)), spec.train, spent=0.0, scoring_calls=0)
    saved = []
    for step in range(1, 31):
        now += 13.0
        if clock.word(step) == "checkpoint":
            saved.append(step)
            clock.saved()
    assert saved == [5, 10, 15, 20, 25, 30]


def test_earlier_checkpoints_are_scored_without_making_steps_again(dataset: Dataset, tmp_path: Path) -> None:
    run = trained(scored_spec(score=None, checkpoint_every=5, keep_checkpoints=9), dataset, tmp_path)
    longer = scored_spec(images=800, keep_checkpoints=9)
    train(longer, dataset, run)
    assert run.scores.steps() == [5, 10, 15, 20, 25]
    assert {json.loads(line)["step"] for line in newest_segment(run)[1:]} == {21, 22, 23, 24, 25}


def newest_segment(run: Run) -> list[str]:
    folder = run.place / "journal"
    return (folder / max(folder.list())).read().decode().splitlines()


def test_scores_of_other_settings_are_taken_anew(dataset: Dataset, tmp_path: Path) -> None:
    run = trained(scored_spec(keep_checkpoints=9), dataset, tmp_path)
    assert {score.asked for score in run.scores.all()} == {(40, 4)}
    other = scored_spec(keep_checkpoints=9, score={**SCORE, "every_images": 160, "timesteps": 2})
    assert run.scores.taken(other.train) == []
    assert awaited_scores(run, other.train) == [5, 10, 15, 20]
    train(other, dataset, run)
    assert {(score.asked, len(score.error)) for score in run.scores.taken(other.train)} == {((40, 2), 2)}


def test_a_storage_that_takes_no_score_stops_no_step(dataset: Dataset, tmp_path: Path) -> None:
    spec, commit, refused = scored_spec(), Scores.commit, []

    def full(self: Scores, score: HeldOutScore, grid: bytes) -> None:
        if score.step < 20:
            refused.append(score.step)
            raise OSError(28, "No space left on device")
        commit(self, score, grid)

    run = Run.of(spec, dataset.digest, Place.of(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scores, "commit", lambda *given: full(*given) if len(refused) < 6 else commit(*given))
        assert train(spec, dataset, run).step == 20
    assert 5 in refused
    assert run.scores.steps() == [5, 10, 15, 20]  # nothing is lost


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"score": None, "plateau": {"patience_images": 320}}, "train.plateau: it needs train.score, which is off"),
        ({"plateau": {"patience_images": 320}}, "train.score.every_images: train.plateau needs it"),
        ({"keep_best": True}, "train.score.every_images: train.keep_best needs it"),
        ({"images": 10**9, "score": {"every_images": 1}}, "train.score.every_images: 1 images make 31,250,000 scores"),
        (
            {"score": {"every_images": 32}, "plateau": {"patience_images": 32}, "decay": "cosine"},
            "train.plateau: with train.decay cosine the score is best at the end",
        ),
    ],
)
def test_limits_that_cannot_work_are_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_spec(train={**TRAIN, **fields})
    assert said in str(caught.value)


def test_scores_by_an_interval_need_held_out_images(tmp_path: Path) -> None:
    place = Place.of(tmp_path)
    whole = ingest("digits", place, image_size=8, channels=1, held_out=0.0, shard_images=1000)
    check_trainable(tiny_spec(), whole)
    with pytest.raises(UserError, match=r"train\.score: it needs 2 held-out images, .* has 0: raise data\.held_out"):
        check_trainable(scored_spec(), whole)


def test_a_limit_without_effect_is_warned_of() -> None:
    lines = without_effect(scored_spec(every=1000))
    assert lines == ["train.score.every_images: no score is taken, the run ends at 640 images"]
    assert without_effect(scored_spec(plateau={"patience_images": 640})) == [
        "train.plateau: has no effect, the run ends at 640 images"
    ]
