"""SIGINT and SIGTERM to `ddpm train`: whenever they come it ends soon, with what it has, and says how to go on."""

import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.faults.command import Command
from tests.faults.conftest import STEPS, Tell
from tests.faults.evidence import assert_same_bits
from tests.faults.verb import a_while, assert_gone, wait_for

SECONDS = 20.0
"""In which an interrupted command ends."""
AT_ONCE_SECONDS = 10.0
"""In which one ends that is interrupted twice, on a machine that does other things beside: Ray is put away, no more."""


def before_ray(of: Command, moments: random.Random) -> None:
    wait_for(lambda: "ingest:" in of.said(), "the first line", of)
    a_while(moments, 1.0)


def as_ray_starts(of: Command, moments: random.Random) -> None:
    wait_for(lambda: "train: 1 worker starts" in of.said(), "the start of training", of)
    a_while(moments, 8.0)


def among_steps(of: Command, moments: random.Random) -> None:
    of.reach(of.kept() + moments.randint(1, STEPS // 6), of.run.newest_attempt())
    a_while(moments, 0.5)


def as_a_checkpoint_is_written(of: Command, moments: random.Random) -> None:
    of.reach(of.kept() + 1, of.run.newest_attempt())
    of.reach_write()


def at_the_end(of: Command, moments: random.Random) -> None:
    of.reach(STEPS - 20, of.run.newest_attempt())
    a_while(moments, 2.0)


MOMENTS: dict[str, Callable[[Command, random.Random], None]] = {
    "before Ray is up": before_ray,
    "as Ray starts": as_ray_starts,
    "among the steps": among_steps,
    "as a checkpoint is written": as_a_checkpoint_is_written,
    "at the end": at_the_end,
}


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_command_ends_soon_keeps_its_steps_and_goes_on(
    number: signal.Signals, undisturbed: Command, disturbed: Command, moments: random.Random, tell: Tell
) -> None:
    for name, moment in MOMENTS.items():
        disturbed.start()
        moment(disturbed, moments)
        family = disturbed.family()
        attempt, step = (disturbed.moment().attempt, disturbed.moment().step) if disturbed.begun() else (0, 0)
        at = time.monotonic()
        if number == signal.SIGINT:
            os.killpg(disturbed.process.pid, number)  # as a terminal does
        else:
            disturbed.process.send_signal(number)
        ended = disturbed.end(SECONDS)
        tell(
            f"  {number.name} {name}, attempt {attempt}, step {step}: exit {ended.code}, {time.monotonic() - at:.1f} s"
        )
        assert_gone(family)
        if name == "at the end" and not ended.code:  # it came too late
            break
        assert ended.code == 130, ended.said
        assert "interrupted" in ended.said
        assert "Traceback" not in ended.said
        if disturbed.begun():
            kept = disturbed.kept()
            assert kept >= step
            if kept and f"images in {STEPS} steps" not in ended.said:  # it was told as done, and Ray was put away yet
                assert f"keeps step {kept:,}, the same command goes on from there" in ended.said
    disturbed.start()
    disturbed.finish()
    assert_same_bits(undisturbed, disturbed)


@pytest.mark.faults
def test_two_interrupts_end_it_at_once(disturbed: Command, moments: random.Random) -> None:
    disturbed.start()
    disturbed.reach(moments.randint(1, STEPS // 2))
    family = disturbed.family()
    disturbed.process.send_signal(signal.SIGINT)
    disturbed.process.send_signal(signal.SIGINT)
    ended = disturbed.end(AT_ONCE_SECONDS)
    assert ended.code == 130, ended.said
    assert_gone(family)
