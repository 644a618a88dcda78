"""Run as `python -m tests.data.killing VERB SOURCE OUT`: does a piece of work over and over, each time in a new folder
below OUT, and kills it before or after each change of a name on disk: OUT/before-1, OUT/after-1, OUT/before-2, ...

Ends where the work comes to its end before it is killed; that last folder is removed.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset  # noqa: F401  # which every process would import for itself otherwise

from pipelines.data.index import index
from pipelines.data.ingest import ingest
from pipelines.store import Place

RECIPE: dict[str, Any] = {"image_size": 6, "channels": 3, "held_out": 0.3}
VERBS: dict[str, Callable[[str, Place], Any]] = {
    "ingest": lambda source, out: ingest(source, out, shard_images=8, **RECIPE),
    "index": lambda source, out: index(Place.of(source), out, **RECIPE),
}
_CHANGES = ("replace", "rename", "unlink", "rmdir")


def _kill_at(number: int, when: str) -> None:
    """Have this process die around the change of that number."""
    made = 0

    def watched(change: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            nonlocal made
            made += 1
            if made == number and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                change(*args, **options)
            finally:  # there may have been nothing to delete
                if made == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in _CHANGES:
        setattr(os, name, watched(getattr(os, name)))


def main(verb: str, source: str, root: str) -> None:
    for number in range(1, 1000):
        for when in ("before", "after"):
            out = Path(root) / f"{when}-{number}"
            child = os.fork()
            if not child:
                _kill_at(number, when)
                VERBS[verb](source, Place.of(out))
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                shutil.rmtree(out, ignore_errors=True)
                sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
