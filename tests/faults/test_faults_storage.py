"""The storage fills up in mid-run: training goes on and says so, and ends whole when there is room again."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.store import Place
from pipelines.train.run import Run
from tests.faults.command import EVERY, Command, command
from tests.faults.conftest import STEPS
from tests.faults.disk import fill
from tests.faults.evidence import assert_same_bits
from tests.faults.verb import a_while, wait_for


@pytest.fixture
def confined(small: Path, spec: Path) -> Iterator[Command]:
    """The disturbed run, its store on that."""
    with command(spec, small / "store") as given:
        yield given


def test_who_trains_and_who_drives_understand_each_other_where_no_byte_is_left(small: Path) -> None:
    run = Run(Place.of(small / "run"))
    run.show({"attempt": 1, "trouble": "no more than this for a beginning"})
    fill(small)
    with pytest.raises(OSError, match="No space left"):
        (run.place / "another").write(b"word")
    for trouble in ("checkpoint 5 could not be written (No space left on device)", None):
        run.show({"attempt": 1, "trouble": trouble})
        assert run.live() == {"attempt": 1, "trouble": trouble}
    run.ask("checkpoint")
    assert run.asked() == "checkpoint"
    run.ask("stop")
    assert run.asked() == "stop"
    run.forget_asked()
    assert run.asked() is None


@pytest.mark.faults
def test_training_goes_on_while_the_storage_is_full_and_ends_whole_when_there_is_room(
    small: Path, confined: Command, undisturbed: Command, moments: random.Random
) -> None:
    confined.start()
    confined.reach(moments.randint(1, STEPS // 3))
    filler = fill(small)
    kept = confined.kept()
    wait_for(lambda: "training goes on" in confined.said(), "a warning of the full storage", confined)
    assert "No space left on device" in confined.said()
    assert kept <= confined.kept() <= kept + EVERY
    for step in confined.run.checkpoints.steps():
        assert confined.run.checkpoints.verifies(step)
    a_while(moments, 2.0)
    filler.unlink()
    assert confined.finish().result["attempts"] == 1, "it was not started again for that"
    assert_same_bits(undisturbed, confined)


@pytest.mark.faults
def test_an_interrupt_while_the_storage_is_full_keeps_the_older_checkpoint(
    small: Path, confined: Command, undisturbed: Command, moments: random.Random
) -> None:
    confined.start()
    confined.reach(moments.randint(20, STEPS // 3))
    wait_for(confined.kept, "the first checkpoint", confined)
    filler = fill(small)
    a_while(moments, 2.0)
    confined.process.send_signal(signal.SIGINT)
    ended = confined.end(20)
    assert ended.code == 130, ended.said
    assert f"keeps step {confined.kept():,}" in ended.said
    filler.unlink()
    confined.start()
    confined.finish()
    assert_same_bits(undisturbed, confined)
