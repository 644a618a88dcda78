"""A worker of an earlier attempt that wakes up when a later one drives the run changes nothing of it.

Ray's own workers end when their raylet does. This one is not of Ray: the loop alone, in a process that nobody ends.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

from pipelines.data.manifest import Dataset
from pipelines.spec import load_spec
from pipelines.store import Place
from pipelines.train.run import Run
from tests.faults.command import Command
from tests.faults.conftest import STEPS
from tests.faults.evidence import assert_same_bits
from tests.faults.verb import PATIENCE_SECONDS, a_while, wait_for

_TRAIN = """
import json, sys
from pipelines.train.loop import train_from_config
from pipelines.train.world import World
train_from_config(json.loads(sys.argv[1]), World())
"""


@contextmanager
def earlier_worker(of: Command, whole: Command) -> Iterator[psutil.Popen]:
    """The first attempt at a run that nobody drives yet, on the images of the whole one."""
    spec = load_spec(of.spec, ())
    (name,) = Place.of(whole.store / "datasets").list()
    dataset = Dataset.open(Place.of(whole.store / "datasets" / name))
    run = Run.of(spec, dataset.digest, Place.of(of.store))
    run.describe(spec, dataset.digest)
    config = {"spec": spec.model_dump(mode="json"), "dataset": str(dataset.place), "run": str(run.place)}
    with psutil.Popen([sys.executable, "-c", _TRAIN, json.dumps(config)], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def look(found: Callable[[], object]) -> None:
    """Wait for it, every millisecond: it may be there for a few only."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not found():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.faults
@pytest.mark.parametrize("where", ["among the steps", "as a checkpoint is written"])
def test_a_worker_that_wakes_up_under_a_later_attempt_changes_nothing(
    where: str, undisturbed: Command, disturbed: Command, moments: random.Random
) -> None:
    with earlier_worker(disturbed, undisturbed) as zombie:
        at = moments.randint(1, STEPS // 3)
        look(lambda: disturbed.moment().step >= at)
        if where == "as a checkpoint is written":
            look(disturbed.half_written)
        zombie.suspend()
        before = disturbed.kept()
        disturbed.start()
        disturbed.reach(before + 1, after_attempt=1)
        a_while(moments, 1.0)
        zombie.resume()
        while zombie.poll() is None:
            live = disturbed.run.live()
            assert live is None or live["attempt"] > 1, "it spoke for the run"
            time.sleep(0.002)
        assert "attempt 1 of run" in (said := zombie.stderr.read()), said
        assert "was superseded: it writes no more" in said
    wait_for(lambda: disturbed.moment().attempt == 2, "the later attempt's word", disturbed)
    disturbed.finish()
    assert_same_bits(undisturbed, disturbed)
