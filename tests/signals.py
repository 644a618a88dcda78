"""Signals of the processes that tests start."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def not_ignored(number: signal.Signals) -> Iterator[None]:
    """A shell's background job, which the tests may be, ignores SIGINT, and the processes that it starts inherit it."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        yield
        return
    signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_IGN)
