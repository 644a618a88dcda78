"""Another number of workers from one start to the next, and workers that end in other ways than by a kill."""

import os
import random
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.faults import killing
from tests.faults.command import Command, command, write_spec
from tests.faults.conftest import STEPS, Tell
from tests.faults.evidence import assert_same_bits
from tests.faults.verb import a_while, end_by

TURNS = (1, 2, 1, 4)


@pytest.mark.faults
def test_other_numbers_of_workers_in_mid_run_change_no_bit(
    undisturbed: Command, disturbed: Command, moments: random.Random
) -> None:
    attempt = 0
    for number, workers in enumerate(TURNS):
        disturbed.start(f"--set=train.workers={workers}")
        if number == len(TURNS) - 1:
            break
        # In the first half: a killed driver's workers make steps for seconds, and must not come to the end.
        first, last = (STEPS * part // (2 * len(TURNS)) for part in (number, number + 1))
        moment = disturbed.reach(moments.randint(first + 1, last), attempt)
        assert disturbed.run.worker(moment.attempt, workers - 1) is not None
        assert disturbed.run.worker(moment.attempt, workers) is None
        if moments.random() < 0.5:
            disturbed.kill()
        else:
            disturbed.process.send_signal(signal.SIGINT)
            assert disturbed.end().code == 130
        attempt = disturbed.run.newest_attempt()
    disturbed.finish()
    last = disturbed.run.newest_attempt()
    assert disturbed.run.worker(last, TURNS[-1] - 1) is not None
    assert_same_bits(undisturbed, disturbed)


@pytest.mark.faults
def test_a_worker_that_is_told_to_end_is_replaced(
    undisturbed: Command, disturbed: Command, moments: random.Random
) -> None:
    disturbed.start("--set=train.workers=2")
    moment = disturbed.reach(moments.randint(1, STEPS // 2))
    a_while(moments, 0.3)
    end_by(signal.SIGTERM, disturbed.worker(moment.attempt, moments.randrange(2)))
    assert disturbed.finish().result["attempts"] == moment.attempt + 1
    assert_same_bits(undisturbed, disturbed)


@pytest.mark.faults
def test_what_a_dead_controller_held_is_free_for_the_next(tmp_path: Path, moments: random.Random, tell: Tell) -> None:
    """Of the command's own Ray, whose CPUs the workers need all of."""
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    whole = {"train__workers": 2, "train__threads": threads, "train__oversubscribe": False}
    with command(write_spec(tmp_path / "spec.yaml", STEPS, **whole), tmp_path / "store") as given:
        given.start()
        kill = killing.kill("controller", killing.controller(moments), given, moments.randint(1, STEPS // 2), 0)
        tell(f"  {kill}")
        assert given.finish().result["attempts"] == kill.attempt + 1


@pytest.mark.faults
def test_a_controller_that_dies_over_and_over_ends_the_run_with_a_line(tmp_path: Path, moments: random.Random) -> None:
    with command(write_spec(tmp_path / "spec.yaml", STEPS), tmp_path / "store") as given:
        given.start(f"--set=train.checkpoint_every={STEPS}")
        while given.is_running():
            with suppress(AssertionError, psutil.NoSuchProcess):  # it has ended, or the controller has
                given.reach(1, given.moment().attempt if given.begun() else 0)
                end_by(signal.SIGKILL, given.controller())
        ended = given.end()
        assert ended.code == 1
        assert "Ray Train's controller died 6 times and no checkpoint came in between" in ended.said
        assert "Traceback" not in ended.said
