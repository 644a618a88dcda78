"""A worker of an earlier attempt that wakes up when a later one drives the run changes nothing of it."""

import random
import signal
import time

import psutil
import pytest

from tests.faults.command import LINGERS_SECONDS, Command, a_while, is_alive, wait_for
from tests.faults.conftest import STEPS
from tests.faults.evidence import assert_same_bits


@pytest.mark.faults
@pytest.mark.parametrize("where", ["among the steps", "as a checkpoint is written"])
def test_a_worker_that_wakes_up_under_a_later_attempt_changes_nothing(
    where: str, undisturbed: Command, disturbed: Command, moments: random.Random
) -> None:
    disturbed.start()
    asleep = disturbed.reach(moments.randint(1, STEPS // 3))
    zombie = disturbed.worker(asleep.attempt, 0)
    if where == "as a checkpoint is written":
        disturbed.reach_write()
    zombie.suspend()
    try:
        family = disturbed.family() - {zombie}
        disturbed.process.kill()
        disturbed.process.wait()
        psutil.wait_procs(family, timeout=LINGERS_SECONDS)
        assert is_alive(zombie), "it did not sleep through the end of its driver"
        before = disturbed.kept()
        disturbed.start()
        disturbed.reach(before + 1, asleep.attempt)
        a_while(moments, 1.0)
        assert disturbed.moment().attempt > asleep.attempt
    finally:
        zombie.send_signal(signal.SIGCONT)
    end = time.monotonic() + LINGERS_SECONDS
    while is_alive(zombie):
        live = disturbed.run.live()
        assert live is None or live["attempt"] > asleep.attempt, "it spoke for the run"
        assert time.monotonic() < end, f"{zombie} outlived its Ray by {LINGERS_SECONDS:g} s"
        time.sleep(0.005)
    wait_for(lambda: disturbed.moment().attempt > asleep.attempt or None, "a later attempt's word", disturbed)
    disturbed.finish()
    names = disturbed.run.place.path.joinpath("journal").iterdir()
    late = [name.name for name in names if name.name.endswith(f"-{asleep.attempt:04d}.jsonl")]
    assert all(int(name[:9]) <= before for name in late) or where != "among the steps", f"it wrote {late}"
    assert_same_bits(undisturbed, disturbed)
