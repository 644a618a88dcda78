"""Saving goes on beside training, outlives a full disk, and loses no row."""

import contextlib
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.errors import Failed
from pipelines.store import Place
from pipelines.train import recorder
from pipelines.train.checkpoint import Checkpoint, Checkpoints
from pipelines.train.loop import Trainer, World, train
from pipelines.train.run import Run
from tests.conftest import tiny_spec
from tests.train.train_helpers import trained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = Place.of(tmp_path_factory.mktemp("data") / "digits")
    return ingest("digits", out, image_size=8, channels=1, held_out=0.4, shard_images=128)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """The kernel refuses files beyond 2 KiB: no checkpoint fits, small notes do."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_stops_no_step_and_loses_no_row(dataset: Dataset, tmp_path: Path) -> None:
    spec = tiny_spec(train__log_every=1)
    undisturbed = trained(spec, dataset, tmp_path / "undisturbed")
    run = Run.of(spec, dataset.digest, Place.of(tmp_path / "full"))
    run.describe(spec, dataset.digest)
    trainer = Trainer(spec, dataset, run, World())
    with trainer.stream() as stream:
        for step in range(1, spec.train.total_steps + 1):
            trainer.take_step(stream)
            with full_disk() if step in (4, 5, 6) else contextlib.nullcontext():
                trainer.save()
                trainer.recorder.settle()
            assert run.checkpoints.steps()[-1] == (step if step not in (4, 5, 6) else 3)
            assert run.checkpoints.verifies(run.checkpoints.steps()[-1])
        trainer.recorder.finish()
    last = spec.train.total_steps
    assert run.checkpoints.digests(last) == undisturbed.checkpoints.digests(last)
    rows, expected = (list(one.journal.read(last)) for one in (run, undisturbed))
    assert [(row.step, row.exact) for row in rows] == [(row.step, row.exact) for row in expected]


def test_the_driver_is_told_of_a_full_disk_until_it_is_over(dataset: Dataset, tmp_path: Path) -> None:
    spec = tiny_spec(train__log_every=1)
    run = Run.of(spec, dataset.digest, Place.of(tmp_path))
    run.describe(spec, dataset.digest)
    trainer = Trainer(spec, dataset, run, World())
    told = []
    with trainer.stream() as stream:
        for full in (False, True, False):
            trainer.take_step(stream)
            with full_disk() if full else contextlib.nullcontext():
                trainer.save()
                trainer.recorder.settle()
            trainer.recorder.show(always=True)
            told.append(run.live()["trouble"])
    assert told[0] is told[2] is None
    assert told[1].startswith("checkpoint 2 could not be written (")
    assert "File too large" in told[1]


def test_who_was_superseded_speaks_no_more_for_the_run(dataset: Dataset, tmp_path: Path) -> None:
    spec = tiny_spec(train__log_every=1)
    run = Run.of(spec, dataset.digest, Place.of(tmp_path))
    run.describe(spec, dataset.digest)
    earlier, later = (Trainer(spec, dataset, run, World()) for _ in range(2))
    with earlier.stream() as images, later.stream() as same:
        for trainer, stream, times in ((earlier, images, 1), (later, same, 1), (earlier, images, 2)):
            for _ in range(times):
                trainer.take_step(stream)
                trainer.recorder.show(always=True)
        assert (run.live()["attempt"], run.live()["images"]) == (2, 32)
        earlier.save()
        with pytest.raises(RuntimeError, match=r"attempt 1 of run .* was superseded"):
            earlier.recorder.settle()
    assert run.checkpoints.steps() == []
    assert list(run.journal.read(10**9)) == []


def test_a_last_checkpoint_that_cannot_be_written_is_no_clean_end(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.train.recorder._LAST_PAUSE_SECONDS", 0.01)
    spec = tiny_spec(train__images=96, train__checkpoint_every=1)
    run = Run.of(spec, dataset.digest, Place.of(tmp_path))
    run.describe(spec, dataset.digest)

    def fill(trainer: Trainer) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with pytest.raises(
            Failed, match=r"checkpoint 3 could not be written \(.*File too large.*mend that and run it again"
        ):
            train(spec, dataset, run, at_checkpoint=fill)
    assert run.checkpoints.steps() == [1]
    assert train(spec, dataset, run).step == 3


def test_training_goes_on_while_a_checkpoint_is_written(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps after it change nothing of what is written."""
    spec = tiny_spec(train__log_every=1)
    run = Run.of(spec, dataset.digest, Place.of(tmp_path))
    run.describe(spec, dataset.digest)
    trainer = Trainer(spec, dataset, run, World())
    commit, steps = Checkpoints.save, []

    def late(self: Checkpoints, checkpoint: Checkpoint, *keep: Any, **more: Any) -> None:
        while trainer.step < 3:  # for ever, if training waited
            time.sleep(0.01)
        steps.append(trainer.step)
        commit(self, checkpoint, *keep, **more)

    monkeypatch.setattr(Checkpoints, "save", late)
    with trainer.stream() as stream:
        trainer.take_step(stream)
        weights = trainer.state.weights.detach().clone()
        trainer.save()
        trainer.take_step(stream)
        trainer.take_step(stream)
        trainer.recorder.settle()
    assert steps == [3]
    ours = dict(trainer.model.named_parameters())
    saved = torch.cat([run.checkpoints.load(1).model[name].reshape(-1) for name in ours])
    assert torch.equal(saved, weights)


def test_a_storage_that_hangs_holds_up_no_step_for_long(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks wait for rank 0 in each step, for two minutes at most."""
    spec = tiny_spec(train__images=128)
    run = Run.of(spec, dataset.digest, Place.of(tmp_path))
    trainer = Trainer(spec, dataset, run, World())
    commit, answers = Checkpoints.save, threading.Event()

    def hang(self: Checkpoints, checkpoint: Checkpoint, *keep: Any, **more: Any) -> None:
        assert answers.wait(60)
        commit(self, checkpoint, *keep, **more)

    monkeypatch.setattr(Checkpoints, "save", hang)
    monkeypatch.setattr(recorder, "_PATIENCE_SECONDS", 0.2)
    with trainer.stream() as stream:
        for _ in range(3):
            trainer.take_step(stream)
            trainer.save()
        trainer.recorder.show(always=True)
        live = run.live()
        assert live is not None
        assert live["trouble"] == "checkpoint 1 is not written after 0.2 s (the storage is slow)"
        answers.set()
        trainer.take_step(stream)
        trainer.save()
        trainer.recorder.finish()
    assert run.checkpoints.steps()[-1] == 4
    assert [row.step for row in run.journal.read(10)] == [1, 2, 3, 4]
