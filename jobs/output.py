"""Results go to stdout, everything else to stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Stdout is for results: what libraries print goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_result(as_json: bool, value: Any, show: Callable[[], object]) -> None:
    """A verb's result: as one JSON object in a line, or as `show` prints it."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False, default=str), flush=True)
    else:
        show()
