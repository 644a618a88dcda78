"""Ends before `train.images`: by a plateau of the held-out score and by a budget, the same however they are come to."""

from pathlib import Path

import pytest

from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.errors import UserError
from pipelines.progress import Progress
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.checkpoint import MODEL, OPTIMIZER
from pipelines.train.driver import train as drive
from pipelines.train.driver import trained as is_trained
from pipelines.train.end import awaited_scores, last_step, plateau_end, settled_step
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.conftest import tiny_spec
from tests.train.train_helpers import TRAIN, scored_spec, trained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = Place.of(tmp_path_factory.mktemp("data") / "dataset")
    return ingest("digits", place, image_size=8, channels=1, held_out=0.4, shard_images=100)


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


def test_a_budget_ends_a_run_and_what_it_reached_makes_the_same_model(dataset: Dataset, session: Session) -> None:
    spec = tiny_spec(train={**TRAIN, "images": 64_000, "budget_minutes": 0.02, "log_every": 1})
    said: list[str] = []
    done = drive(spec, dataset, session.store, session.cluster, session.tracker, _Saying(said))
    assert done.why == "budget"
    assert 0 < done.step < spec.train.total_steps
    assert any(f"`train.images: {32 * done.step}`" in line for line in said)
    assert drive(spec, dataset, session.store, session.cluster, session.tracker, Progress()) == done

    without = tiny_spec(train={**TRAIN, "images": 32 * done.step})
    again = drive(without, dataset, session.store, session.cluster, session.tracker, Progress())
    assert (again.run, again.model_sha256) == (done.run, done.model_sha256)
    # A budget is of the run's whole time: what was spent is not given again.
    run = Run.of(spec, dataset.digest, session.store)
    (run.place / "end.json").delete()
    assert train(spec, dataset, run).step == done.step


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
