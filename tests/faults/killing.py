"""Kills that cost a run steps."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from tests.faults.command import Command, Moment
from tests.faults.verb import a_while, assert_gone, end_by

WRITE_SECONDS = 0.01
"""Longest time from the sight of a half-written checkpoint to the kill."""

Deed = Callable[[Command, Moment], bool]
"""Kills something of an attempt; False where it came too late to be what was meant."""


@dataclass(frozen=True)
class Kill:
    """One that counts."""

    what: str
    attempt: int
    at_step: int
    """The last step that the killed attempt told of."""
    lost: int
    """Steps of these that the next attempt had to make again."""


def kill(
    what: str, deed: Deed, of: Command, at_step: int, after_attempt: int, then: Callable[[], None] | None = None
) -> Kill:
    """Do it at that step or later, again and again until it has cost a step; the next attempt goes on from there, by
    itself or by what is done `then`.
    """
    while True:
        moment = of.reach(at_step, after_attempt)
        meant = deed(of, moment)
        last = of.moment()
        step = last.step if last.attempt == moment.attempt else moment.step
        if then is not None:
            then()
        of.reach_attempt(after=moment.attempt)
        if meant and step > of.kept():
            return Kill(what, moment.attempt, step, step - of.kept())
        after_attempt = moment.attempt


def worker(workers: int, moments: random.Random) -> Deed:
    """One rank of so many."""

    def deed(of: Command, moment: Moment) -> bool:
        a_while(moments, 0.3)
        rank = moments.randrange(workers)
        return _killed(lambda: of.worker(moment.attempt, rank))

    return deed


def controller(moments: random.Random) -> Deed:
    """Ray Train's own."""

    def deed(of: Command, moment: Moment) -> bool:
        a_while(moments, 0.3)
        return _killed(of.controller)

    return deed


def driver(moments: random.Random) -> Deed:
    """The command itself; its workers, which outlive it by seconds, make steps as long as they can."""

    def deed(of: Command, moment: Moment) -> bool:
        a_while(moments, 0.3)
        workers = of.workers(moment.attempt)
        of.kill()
        assert_gone(set(workers))
        return True

    return deed


def writer(moments: random.Random) -> Deed:
    """Rank 0, while it writes a checkpoint: it is stopped at that moment, and goes on where the write was over by then,
    until it is not."""

    def deed(of: Command, moment: Moment) -> bool:
        rank_0 = of.worker(moment.attempt, 0)
        try:
            while True:
                written = of.reach_write()
                a_while(moments, WRITE_SECONDS)
                rank_0.suspend()
                while rank_0.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    time.sleep(0.001)
                if written.exists():  # and lies there, half-written, until the next driver begins
                    break
                rank_0.resume()
        except psutil.NoSuchProcess:
            return False
        return _killed(lambda: rank_0) and written.exists()

    return deed


def _killed(find: Callable[[], psutil.Process]) -> bool:
    """Whether what is to be found was alive yet."""
    try:
        end_by(signal.SIGKILL, find())
    except psutil.NoSuchProcess:
        return False
    return True
