"""Checkpoints and the journal: whole or absent, damage named and passed over, each step read once."""

from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from pipelines.store import Place
from pipelines.train.checkpoint import Checkpoint, Checkpoints
from pipelines.train.journal import Journal, Row
from pipelines.train.run import Run


def checkpoint(step: int) -> Checkpoint:
    tensors = {"w": torch.full((3, 2), float(step)), "b": torch.arange(4.0)}
    return Checkpoint(
        step=step, images=step * 8, model=tensors, ema=tensors, optimizer={"exp_avg.w": tensors["w"]}, environment={}
    )


def test_checkpoint_round_trip_and_thinning(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Place.of(tmp_path))
    for step in (5, 10, 15):
        checkpoints.save(checkpoint(step), keep=2)
    assert checkpoints.steps() == [10, 15]
    loaded = checkpoints.load(10)
    assert (loaded.step, loaded.images) == (10, 80)
    assert torch.equal(loaded.model["w"], torch.full((3, 2), 10.0))
    assert set(loaded.optimizer) == {"exp_avg.w"}


def test_every_so_many_steps_a_checkpoint_is_kept_for_good(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Place.of(tmp_path))
    for step in range(5, 50, 5):
        checkpoints.save(checkpoint(step), keep=2, every=20)
    assert checkpoints.steps() == [20, 40, 45]
    checkpoints.save(checkpoint(50), keep=2, every=20)
    assert checkpoints.steps() == [20, 40, 45, 50]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(Place.of(tmp_path))
    checkpoints.save(checkpoint(5), keep=2)
    checkpoints.save(checkpoint(10), keep=2)
    file = tmp_path / "000000010" / ("MANIFEST.json" if damage == "manifest" else "optimizer.safetensors")
    data = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes({"flip": data[:-1] + bytes([data[-1] ^ 1]), "truncate": data[:-3], "manifest": b"{"}[damage])
    with pytest.warns(UserWarning, match=file.name):
        found = checkpoints.latest()
    assert found is not None
    assert found.step == 5


def test_a_damaged_later_checkpoint_does_not_cost_the_fresh_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Place.of(tmp_path))
    for step in (20, 30):
        checkpoints.save(checkpoint(step), keep=2)
        (tmp_path / f"{step:09d}" / "ema.safetensors").write_bytes(b"torn")
    checkpoints.save(checkpoint(5), keep=2)
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoints.latest_step() == 5
    assert not checkpoints.verifies(20)
    assert checkpoints.verifies(5)


def test_the_last_step_of_a_run_is_one_that_verifies(tmp_path: Path) -> None:
    run = Run(Place.of(tmp_path))
    with pytest.raises(UserError, match="no checkpoint yet"):
        run.last_step()
    for step in (5, 10):
        run.checkpoints.save(checkpoint(step), keep=2)
    with open(tmp_path / "checkpoints" / "000000010" / "ema.safetensors", "ab") as file:
        file.write(b"!")
    with pytest.warns(UserWarning, match="checkpoint 10 is damaged"):
        assert run.last_step() == 5


def test_a_pinned_checkpoint_outlives_thinning(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Place.of(tmp_path))
    checkpoints.save(checkpoint(5), keep=1)
    checkpoints.pin(5)
    for step in (10, 15):
        checkpoints.save(checkpoint(step), keep=1)
    assert checkpoints.steps() == [5, 15]


def test_an_unknown_format_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Place.of(tmp_path))
    checkpoints.save(checkpoint(5), keep=1)
    manifest = tmp_path / "000000005" / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format 2"):
        checkpoints.latest()


def test_weights_bytes_hold_no_time(tmp_path: Path) -> None:
    one, two = Checkpoints(Place.of(tmp_path / "a")), Checkpoints(Place.of(tmp_path / "b"))
    one.save(checkpoint(5), keep=1)
    two.save(checkpoint(5), keep=1)
    assert one.digests(5) == two.digests(5)


def row(step: int, wall: float) -> Row:
    return Row(step=step, images=step * 8, time_ms=step, exact={"loss": 1.0 / step}, wall={"rate": wall})


def test_journal_reads_each_step_once_and_not_past_the_checkpoint(tmp_path: Path) -> None:
    journal = Journal(Place.of(tmp_path))
    journal.commit(1, [row(s, 1.0) for s in (1, 2, 3)])
    journal.commit(1, [row(s, 1.0) for s in (4, 5, 6)])  # its checkpoint was never committed
    journal.commit(2, [row(s, 2.0) for s in (4, 5, 6)])
    journal.commit(2, [row(s, 2.0) for s in (7, 8)])
    journal.commit(3, [])
    rows = list(journal.read(last_step=7, after=1))
    assert [r.step for r in rows] == [2, 3, 4, 5, 6, 7]
    assert [r.wall["rate"] for r in rows] == [1, 1, 2, 2, 2, 2]
    assert rows[0].exact == {"loss": 0.5}
