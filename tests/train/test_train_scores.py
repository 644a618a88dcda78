"""Held-out scores along the way: the same whoever takes them, and ends that follow from them."""

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
from pipelines.progress import Progress
from pipelines.sections import Plateau
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train import pace
from pipelines.train.checkpoint import EMA, MODEL, OPTIMIZER
from pipelines.train.driver import train as drive
from pipelines.train.driver import trained as is_trained
from pipelines.train.end import awaited_scores, last_step, plateau_end, settled_step
from pipelines.train.loop import train
from pipelines.train.pace import SCORING_SHARE, Pace
from pipelines.train.run import Run, check_trainable
from pipelines.train.scores import HeldOutScore, Scores, best, patience_ran_out
from pipelines.train.scoring import Scoring
from pipelines.unused import without_effect
from tests.conftest import tiny_spec
from tests.train.train_helpers import trained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = Place.of(tmp_path_factory.mktemp("data") / "dataset")
    return ingest("digits", place, image_size=8, channels=1, held_out=0.4, shard_images=100)


def scored_spec(every: int = 160, **train: Any) -> Spec:
    return tiny_spec(train={**_TRAIN, "score": {**_SCORE, "every_images": every}, **train})


_SCORE = {"images": 40, "timesteps": 4, "grid": 20}
_TRAIN = {"images": 640, "global_batch": 32, "slots": 4, "checkpoint_every": 50, "learning_rate": 0.002}


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


# Of a run that gains nothing: a learning rate so low that the average stays what it was.
_STUCK = {"learning_rate": 1e-12, "plateau": {"patience_images": 320, "least_gain": 0.001}, "keep_checkpoints": 1}


def test_a_run_ends_where_its_patience_runs_out_and_is_the_model_of_so_many_images(
    dataset: Dataset, session: Session, tmp_path: Path
) -> None:
    spec = scored_spec(**_STUCK)
    run = Run.of(spec, dataset.digest, session.store)
    # By the ranks, by a task beside them, and with more patience afterwards.
    outcome = train(spec, dataset, Run.of(spec, dataset.digest, Place.of(tmp_path)))
    said: list[str] = []
    done = drive(spec, dataset, session.store, session.cluster, session.tracker, _Saying(said))
    assert (outcome.step, outcome.why) == (15, "plateau")  # the first score is a gain; 320 images on, none is another
    assert (done.step, done.why) == (15, "plateau")
    assert run.checkpoints.steps()[-1] == 15  # what came later is gone
    assert last_step(run, spec.train) == 15
    assert any("`train.images: 480` makes the same model again" in line for line in said)
    assert drive(spec, dataset, session.store, session.cluster, session.tracker, Progress()) == done

    plain = scored_spec(learning_rate=1e-12, images=480, score=None)
    again = trained(plain, dataset, tmp_path / "again")
    assert again.name == run.name  # the limit is no part of what a run is
    ends = [one.checkpoints.digests(15) for one in (again, run)]
    assert ends[0][MODEL] == ends[1][MODEL]
    assert ends[0][OPTIMIZER] == ends[1][OPTIMIZER]

    patient = scored_spec(**{**_STUCK, "plateau": {"patience_images": 400, "least_gain": 0.001}})
    assert drive(patient, dataset, session.store, session.cluster, session.tracker, Progress()).step == 20
    assert drive(spec, dataset, session.store, session.cluster, session.tracker, Progress()).step == 15


def test_less_patience_than_a_run_had_is_refused_where_its_end_is_not_kept(dataset: Dataset, session: Session) -> None:
    patient = scored_spec(**{**_STUCK, "plateau": {"patience_images": 400, "least_gain": 0.001}})
    hasty = scored_spec(**{**_STUCK, "plateau": {"patience_images": 160, "least_gain": 0.001}})
    run = trained(patient, dataset, session.store.path)
    assert 10 not in run.checkpoints.steps()
    with pytest.raises(UserError, match=r"train\.plateau: .* it ends at 320, and it keeps no checkpoint there"):
        drive(hasty, dataset, session.store, session.cluster, session.tracker, Progress())


class _Saying(Progress):
    def __init__(self, said: list[str]) -> None:
        self._said = said

    def say(self, text: str) -> None:
        self._said.append(text)


def test_a_score_that_a_kill_came_before_is_taken_first(dataset: Dataset, tmp_path: Path) -> None:
    spec = scored_spec(**{**_STUCK, "images": 320})
    run = trained(spec, dataset, tmp_path)
    assert run.scores.steps() == [5, 10]
    (run.scores.place / "000000010.json").delete()  # committed was the checkpoint alone
    longer = scored_spec(**_STUCK)
    assert plateau_end(run, longer.train) is None
    assert train(longer, dataset, run).step == 15
    assert run.scores.steps() == [5, 10, 15]


def test_the_best_checkpoint_is_kept(dataset: Dataset, tmp_path: Path) -> None:
    spec = scored_spec(keep_best=True, keep_checkpoints=1, images=640)
    run = Run.of(spec, dataset.digest, Place.of(tmp_path))
    worse = iter([1.0, 0.5, 2.0, 3.0])
    commit = Scores.commit

    def scored(self: Scores, score: HeldOutScore, grid: bytes) -> None:
        commit(self, dataclasses.replace(score, bits_per_dim=next(worse)), grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scores, "commit", scored)
        train(spec, dataset, run)
    assert run.checkpoints.steps() == [10, 20]


def test_a_budget_ends_a_run_and_what_it_reached_makes_the_same_model(dataset: Dataset, session: Session) -> None:
    spec = tiny_spec(train={**_TRAIN, "images": 64_000, "budget_minutes": 0.02, "log_every": 1})
    said: list[str] = []
    done = drive(spec, dataset, session.store, session.cluster, session.tracker, _Saying(said))
    assert done.why == "budget"
    assert 0 < done.step < spec.train.total_steps
    assert any(f"`train.images: {32 * done.step}`" in line for line in said)
    assert drive(spec, dataset, session.store, session.cluster, session.tracker, Progress()) == done

    without = tiny_spec(train={**_TRAIN, "images": 32 * done.step})
    again = drive(without, dataset, session.store, session.cluster, session.tracker, Progress())
    assert (again.run, again.model_sha256) == (done.run, done.model_sha256)
    # A budget is of the run's whole time: what was spent is not given again.
    run = Run.of(spec, dataset.digest, session.store)
    (run.place / "end.json").delete()
    assert train(spec, dataset, run).step == done.step


def test_without_an_interval_ranks_score_in_a_twentieth_of_the_time(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    spec = tiny_spec(train={**_TRAIN, "checkpoint_every": 1, "images": 32_000})
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
    spec = tiny_spec(train={**_TRAIN, "checkpoint_every": 1000, "checkpoint_minutes": 1.0})
    clock = Pace(Run(Place.of(tmp_path)), spec.train, spent=0.0, scoring_calls=0)
    saved = []
    for step in range(1, 31):
        now += 13.0
        if clock.word(step) == "checkpoint":
            saved.append(step)
            clock.saved()
    assert saved == [5, 10, 15, 20, 25, 30]


def test_a_run_whose_last_scores_are_missing_is_not_complete(dataset: Dataset, session: Session) -> None:
    """A driver that dies while scores lag behind: they are taken, and end the run where they would have ended it."""
    spec = scored_spec(**_STUCK)
    run = trained(scored_spec(**{**_STUCK, "plateau": None, "keep_checkpoints": 9}), dataset, session.store.path)
    for step in (15, 20):
        (run.scores.place / f"{step:09d}.json").delete()
    assert run.checkpoints.steps() == [5, 10, 15, 20]
    assert is_trained(run, spec) is None
    assert awaited_scores(run, spec.train) == [15, 20]
    assert settled_step(run, spec.train) == 15
    done = drive(spec, dataset, session.store, session.cluster, session.tracker, Progress())
    assert (done.step, done.why) == (15, "plateau")
    rows = session.tracker.client().get_metric_history(session.tracker.run_id(run, spec, dataset), "images_seen")
    assert max(row.step for row in rows) == 15


def test_an_end_that_lies_ahead_is_come_to_and_not_taken_for_reached(dataset: Dataset, tmp_path: Path) -> None:
    """Scores of steps that are to be made again, for their checkpoints are damaged."""
    spec = scored_spec(**{**_STUCK, "keep_checkpoints": 9})
    run = Run.of(spec, dataset.digest, Place.of(tmp_path))
    assert train(spec, dataset, run).step == 15
    (run.checkpoints.at(15) / MODEL).path.write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint 15 is damaged"):
        again = train(spec, dataset, run)
    assert (again.step, again.why) == (15, "plateau")
    assert run.checkpoints.verifies(15)


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
    other = scored_spec(keep_checkpoints=9, score={**_SCORE, "every_images": 160, "timesteps": 2})
    assert run.scores.taken(other.train) == []
    assert awaited_scores(run, other.train) == [5, 10, 15, 20]
    train(other, dataset, run)
    assert {(score.asked, len(score.error)) for score in run.scores.taken(other.train)} == {((40, 2), 2)}


def test_a_score_that_can_never_be_taken_holds_nothing_back(dataset: Dataset, session: Session) -> None:
    run = trained(scored_spec(score=None, checkpoint_every=20), dataset, session.store.path)
    spec = scored_spec(**_STUCK, images=960)
    assert settled_step(run, scored_spec(images=960, keep_best=True).train) is None
    with pytest.raises(UserError, match=r"train\.plateau: it needs the score of run .* at 160 images"):
        drive(named_like(run, spec), dataset, session.store, session.cluster, session.tracker, Progress())


def named_like(run: Run, spec: Spec) -> Spec:
    """With the learning rate of the run, which names it."""
    train = spec.train.model_copy(update={"learning_rate": run.spec().train.learning_rate})
    return spec.model_copy(update={"train": train})


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
        tiny_spec(train={**_TRAIN, **fields})
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
