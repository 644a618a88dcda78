"""A few of the faults, for every run of the tests; `make faults` has them all."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.data.manifest import Dataset
from pipelines.spec import load_spec
from pipelines.store import Place
from pipelines.train.checkpoint import OPTIMIZER
from tests.faults import killing
from tests.faults.command import Command, command, write_spec
from tests.faults.evidence import assert_same_training, tracked
from tests.train.train_helpers import trained

STEPS = 100


@pytest.fixture
def given(ray_address: str, tmp_path: Path) -> Iterator[Command]:
    """The command on the tests' own Ray, with two workers."""
    spec = write_spec(tmp_path / "spec.yaml", STEPS, ray={"address": ray_address}, train__workers=2)
    settings = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    with command(spec, tmp_path / "store", settings) as disturbed:
        yield disturbed


def test_kills_of_writer_and_driver_and_a_damaged_checkpoint_change_no_bit(
    given: Command, moments: random.Random, tmp_path: Path
) -> None:
    """A worker is killed by the certificate's test."""
    damaged = []

    def damage_and_start() -> None:
        damaged.append(given.kept())
        file = given.run.checkpoints.at(given.kept()).path / OPTIMIZER
        file.write_bytes(file.read_bytes()[:-1])
        given.start()

    given.start()
    kill = killing.kill("writer", killing.writer(moments), given, moments.randint(20, 40), 0)
    killing.kill("driver", killing.driver(moments), given, moments.randint(60, 80), kill.attempt, damage_and_start)
    said = given.finish().said
    assert f"checkpoint {damaged[-1]} is damaged and passed over" in said

    (name,) = Place.of(given.store / "datasets").list()
    dataset = Dataset.open(Place.of(given.store / "datasets" / name))
    alone = trained(load_spec(given.spec, ()), dataset, tmp_path / "alone")  # one process, no Ray
    assert_same_training(alone, given.run, STEPS)
    assert set(tracked(given)["loss"]) == set(range(1, STEPS + 1))
