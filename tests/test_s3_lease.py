"""Leases: locks on S3, whose holders renew them; on a real server, and a way to it at fault."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pipelines.errors import UserError
from pipelines.s3 import S3Place
from pipelines.s3_lease import Terms
from tests.s3_faults import BUCKET, HASTE, FaultyProxy, set_environment, wait_until

QUICK = Terms(lease=2.0, renew=0.3, look=0.1, join=1.0)
"""Of a lease, so that a dead holder's is free while a test waits."""


@pytest.fixture
def root(proxy: FaultyProxy, request: pytest.FixtureRequest) -> S3Place:
    """A prefix of the test's own, used in haste."""
    return S3Place(BUCKET, request.node.name.replace("[", "-").replace("]", ""), HASTE)


def test_a_live_holder_is_named_and_a_free_lease_is_taken_at_once(root: S3Place) -> None:
    lock = root / "lock"
    with lock.lock("run r", terms=QUICK) as check:
        begun = time.monotonic()
        with (
            pytest.warns(UserWarning, match=f"run r is held by process {os.getpid()} on .*whether that is alive"),
            pytest.raises(
                UserError, match=f"run r is being driven by process {os.getpid()} on .*: wait for it or stop"
            ),
            lock.lock("run r", terms=QUICK),
        ):
            pass
        assert time.monotonic() - begun < QUICK.lease
        time.sleep(1.5 * QUICK.lease)  # it is renewed
        check()
    begun = time.monotonic()
    with lock.lock("run r", terms=QUICK):
        assert time.monotonic() - begun < 0.5


_HOLD = """
import sys, time
from pipelines.errors import Failed
from pipelines.s3_lease import Terms
from pipelines.store import Place
with Place.of(sys.argv[1]).lock("run r", terms=Terms(*map(float, sys.argv[2:]))) as check:
    print("held", flush=True)
    for _ in range(600):
        time.sleep(0.1)
        try:
            check()
        except Failed as error:
            print(error, flush=True)
            break
"""


@contextlib.contextmanager
def _holder(root: S3Place) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that holds the lease, and tells if it loses it."""
    command = [sys.executable, "-c", _HOLD, f"{root}/lock", *map(str, dataclasses.astuple(QUICK))]
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            yield holder
        finally:
            holder.kill()


def test_a_killed_holders_lease_is_free_when_its_time_is_over(root: S3Place) -> None:
    with _holder(root) as holder:
        holder.kill()
    begun = time.monotonic()
    with (root / "lock").lock("r", terms=QUICK):
        assert QUICK.lease - QUICK.renew - 0.5 < time.monotonic() - begun < QUICK.lease + 2


def test_who_waits_gets_a_lease_in_turn(root: S3Place) -> None:
    order: list[str] = []

    def second() -> None:
        with (root / "lock").lock("r", wait=True, terms=QUICK):
            order.append("second")

    with (root / "lock").lock("r", terms=QUICK):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(1.5 * QUICK.lease)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]


def test_a_holder_who_was_cut_off_for_longer_than_the_lease_finds_it_taken(
    root: S3Place, proxy: FaultyProxy, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _holder(root) as holder:
        assert holder.stdout is not None
        proxy.always = "refuse"
        set_environment(monkeypatch, f"http://127.0.0.1:{server}")  # our way there is another
        with (root / "lock").lock("run r", terms=QUICK) as check:
            proxy.calm()
            assert holder.stdout.readline().startswith(b"run r was taken over by another process")
            time.sleep(3 * QUICK.renew)
            check()  # and it has not touched ours at its end


def test_a_look_at_a_lease_tells_whether_it_is_held_and_takes_it_from_nobody(
    root: S3Place, proxy: FaultyProxy, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = root / "lock"
    assert not lock.is_held(QUICK)
    with _holder(root) as holder:
        assert lock.is_held(QUICK)
        proxy.always = "refuse"
        set_environment(monkeypatch, f"http://127.0.0.1:{server}")  # our way there is another
        wait_until(lambda: not lock.is_held(QUICK))
        proxy.calm()
        wait_until(lambda: lock.is_held(QUICK))  # it came back, and drives on
        assert holder.poll() is None
    with lock.lock("run r", terms=QUICK):
        pass
    assert not lock.is_held(QUICK)


def test_a_lease_outlives_a_storage_that_is_away_for_a_while(root: S3Place, proxy: FaultyProxy) -> None:
    with (root / "lock").lock("run r", terms=QUICK) as check:
        for fault in ("refuse", "500", "lost"):
            proxy.methods, proxy.faults, before = frozenset({"PUT"}), [fault], proxy.seen.get("PUT", 0)
            wait_until(lambda before=before: proxy.faults == [] and proxy.seen["PUT"] > before + 1)
        # Longer than the lease, even, if nobody else asked for it meanwhile.
        proxy.always = "refuse"
        with pytest.warns(UserWarning, match=r"run r: its lease could not be renewed for 2 s") as said:
            time.sleep(2 * QUICK.lease)
        assert len(said) == 1
        proxy.calm()
        wait_until(lambda: proxy.seen.get("PUT", 0) > 1)
        check()
    begun = time.monotonic()
    with (root / "lock").lock("run r", terms=QUICK):
        assert time.monotonic() - begun < 0.5
