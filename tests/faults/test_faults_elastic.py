"""Workers that come with a host and go with it."""

import random
from pathlib import Path

import pytest

from tests.faults.command import command, write_spec
from tests.faults.evidence import assert_same_bits
from tests.faults.hosts import hosts

STEPS = 400
SLOW = {"model__channels": [64, 64], "train__oversubscribe": False}
"""Ray Train looks for hosts every ten seconds: a run has to be longer than that."""


@pytest.mark.faults
def test_a_run_grows_onto_a_host_that_comes_and_shrinks_when_it_goes(tmp_path: Path, moments: random.Random) -> None:
    alone = write_spec(tmp_path / "alone.yaml", STEPS, train__workers=1, **SLOW)
    with command(alone, tmp_path / "alone") as undisturbed:
        undisturbed.start()
        undisturbed.finish()
        with hosts() as cluster:
            here = {"ray": {"address": cluster.address}, "train__workers": [1, 2]}
            spec = write_spec(tmp_path / "spec.yaml", STEPS, **here, **SLOW)
            with command(spec, tmp_path / "store", cluster.token) as elastic:
                elastic.start()
                small = elastic.reach(moments.randint(1, STEPS // 20))
                assert elastic.run.worker(small.attempt, 1) is None
                host = cluster.join()
                elastic.reach_attempt(after=small.attempt)
                large = elastic.reach(small.step, after_attempt=small.attempt)
                assert host.family() & {elastic.worker(large.attempt, rank) for rank in (0, 1)}
                cluster.lose(host)
                elastic.reach_attempt(after=large.attempt)
                shrunk = elastic.reach(large.step, after_attempt=large.attempt)
                assert elastic.run.worker(shrunk.attempt, 1) is None
                ended = elastic.finish()
                assert "2 workers train" in ended.said
        assert_same_bits(undisturbed, elastic)
