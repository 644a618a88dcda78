"""Locks between processes of one host: the kernel's, on a file, which tells who holds it."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname

from pipelines.errors import UserError

_LOOK_SECONDS = 0.2
"""Longest that who looks whether a lock is held holds it itself: then it is another's."""


@contextlib.contextmanager
def holding(path: Path, what: str, wait: bool) -> Iterator[None]:
    """Hold a file's lock while the block runs; where it is held, wait, or UserError naming the holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        if wait:
            fcntl.flock(file, fcntl.LOCK_EX)
        elif not _try(file.fileno()):
            file.seek(0)
            raise held_by(what, file.read().strip() or "another process")
        file.truncate(0)
        file.write(f"{this_process()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def is_held(path: Path) -> bool:
    """Whether a process holds a file's lock; who is about to take it is not refused for the look."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _try(descriptor: int) -> bool:
    end = time.monotonic() + _LOOK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
        time.sleep(_LOOK_SECONDS / 20)


def this_process() -> str:
    """Who holds a lock from now on, for those who find it held."""
    return f"process {os.getpid()} on {gethostname()} since {datetime.now(UTC).isoformat(timespec='seconds')}"


def held_by(what: str, holder: str) -> UserError:
    return UserError(f"{what} is being driven by {holder}: wait for it or stop it")
