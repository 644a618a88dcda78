"""Workers on two hosts, one of which dies, or is about to: the run goes on when another one has come."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import killing
from tests.faults.command import EVERY, Command, Moment, command, write_spec
from tests.faults.conftest import STEPS, Tell
from tests.faults.evidence import assert_same_bits
from tests.faults.hosts import Hosts, hosts
from tests.faults.verb import a_while, wait_for

LOSSES = 3


@pytest.fixture(scope="module")
def cluster_of_two() -> Iterator[Hosts]:
    with hosts() as found:
        found.join()
        yield found


@pytest.fixture
def spread(cluster_of_two: Hosts, tmp_path: Path) -> Iterator[Command]:
    """The disturbed run on two hosts."""
    on_both = {"train__workers": 2, "train__oversubscribe": False}  # a whole CPU each, and a host has one
    spec = write_spec(tmp_path / "spec.yaml", STEPS, ray={"address": cluster_of_two.address}, **on_both)
    with command(spec, tmp_path / "store", cluster_of_two.token) as given:
        yield given


@pytest.mark.faults
def test_the_loss_of_a_host_changes_no_bit(
    cluster_of_two: Hosts, undisturbed: Command, spread: Command, moments: random.Random, tell: Tell
) -> None:
    def lose(of: Command, moment: Moment) -> bool:
        a_while(moments, 0.3)
        lost = cluster_of_two.alive[-1]
        assert lost.family() & set(of.workers(moment.attempt)), "no worker is there"
        cluster_of_two.lose(lost)
        cluster_of_two.join()
        return True

    spread.start()
    attempt = 0
    for number in range(LOSSES):
        first, last = (STEPS * part // (LOSSES + 1) for part in (number, number + 1))
        kill = killing.kill("raylet of a host", lose, spread, moments.randint(first + 1, last), attempt)
        tell(f"  kill {number + 1}: {kill}")
        attempt = kill.attempt
    spread.finish()
    assert_same_bits(undisturbed, spread)


@pytest.mark.faults
def test_a_host_that_is_about_to_leave_has_a_checkpoint_written(
    cluster_of_two: Hosts, undisturbed: Command, spread: Command, moments: random.Random
) -> None:
    spread.start()
    moment = spread.reach(moments.randint(1, STEPS // 3))
    leaving = cluster_of_two.alive[-1]
    cluster_of_two.drain(leaving, seconds=60)
    wait_for(lambda: "a checkpoint is written now" in spread.said(), "the answer to the drain", spread)
    extra = wait_for(
        lambda: [s for s in spread.run.checkpoints.steps() if s % EVERY], "a checkpoint out of turn", spread
    )
    assert extra[0] >= moment.step
    cluster_of_two.lose(leaving)
    cluster_of_two.join()
    spread.finish()
    assert_same_bits(undisturbed, spread)
