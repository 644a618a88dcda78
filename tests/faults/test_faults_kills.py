"""Twenty kills at moments drawn at random, each of which costs steps, change no bit of what is trained."""

import random

import pytest

from tests.faults import killing
from tests.faults.command import EVERY, Command
from tests.faults.conftest import STEPS, Tell
from tests.faults.evidence import assert_same_bits

WORKERS = 2
KILLS = {"worker": 8, "controller": 3, "driver": 3, "writer of a checkpoint": 3}
ON = (f"--set=train.workers={WORKERS}",)


@pytest.mark.faults
def test_kills_of_workers_controller_driver_and_writer_change_no_bit(
    undisturbed: Command, disturbed: Command, moments: random.Random, tell: Tell
) -> None:
    deeds = {
        "worker": killing.worker(WORKERS, moments),
        "controller": killing.controller(moments),
        "driver": killing.driver(moments),
        "writer of a checkpoint": killing.writer(moments),
    }
    what = [name for name, times in KILLS.items() for _ in range(times)]
    moments.shuffle(what)
    disturbed.start(*ON)
    attempt = 0
    for number, name in enumerate(what):
        # Early enough for what follows the last: a killed driver's workers go on for seconds, and may come to the end.
        first, last = (STEPS * 3 * part // (4 * len(what)) for part in (number, number + 1))
        # Where it has come further by itself, each kill still has some steps to cost, and not always the same ones: as
        # after so many kills by one cause without a checkpoint in between, the run would be given up.
        step = max(
            moments.randint(first + 1, last), disturbed.kept() + moments.randint(1, EVERY * 3 // 2) if number else 0
        )
        again = (lambda: disturbed.start(*ON)) if name == "driver" else None
        kill = killing.kill(name, deeds[name], disturbed, step, attempt, again)
        tell(f"  kill {number + 1}: {kill}")
        assert kill.lost >= 1
        attempt = kill.attempt
    ended = disturbed.finish()
    assert ended.result["attempts"] > len(what)
    assert_same_bits(undisturbed, disturbed)
