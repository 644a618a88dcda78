"""Twenty kills at moments drawn at random, each of which costs steps, change no bit of what is trained."""

import random
from pathlib import Path

import pytest

from tests.faults import killing
from tests.faults.command import EVERY, Command, command, write_spec
from tests.faults.conftest import Tell
from tests.faults.evidence import assert_same_bits

WORKERS = 2
STEPS = 1000
"""More than other runs: a killed driver's workers make steps for seconds, and must not come to the end."""
KILLS = {"worker": 8, "controller": 3, "driver": 3, "writer of a checkpoint": 3}
ON = (f"--set=train.workers={WORKERS}",)


@pytest.mark.faults
def test_kills_of_workers_controller_driver_and_writer_change_no_bit(
    tmp_path: Path, moments: random.Random, tell: Tell
) -> None:
    spec = write_spec(tmp_path / "spec.yaml", STEPS)
    with command(spec, tmp_path / "undisturbed") as undisturbed, command(spec, tmp_path / "store") as disturbed:
        undisturbed.start()
        undisturbed.finish()
        _kill_and_compare(undisturbed, disturbed, moments, tell)


def _kill_and_compare(undisturbed: Command, disturbed: Command, moments: random.Random, tell: Tell) -> None:
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
        first, last = (STEPS * part // (2 * len(what)) for part in (number, number + 1))
        # Where it has come further by itself, each kill still has some steps to cost, and not always the same ones: as
        # after so many kills by one cause without a checkpoint in between, the run would be given up.
        ahead = disturbed.kept() + moments.randint(1, EVERY * 3 // 2) if number else 0
        step = max(moments.randint(first + 1, last), ahead)
        again = (lambda: disturbed.start(*ON)) if name == "driver" else None
        kill = killing.kill(name, deeds[name], disturbed, step, attempt, again)
        tell(f"  kill {number + 1}: {kill}")
        assert kill.lost >= 1
        attempt = kill.attempt
    ended = disturbed.finish()
    assert ended.result["attempts"] > len(what)
    assert_same_bits(undisturbed, disturbed)
