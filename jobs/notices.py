"""Warnings as the user meets them: one line each."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

from pipelines.errors import UserError

_FIELD = re.compile(r"\bdata\.([a-z_]+)")


def warnings_to(say: Callable[[str], object]) -> None:
    """Have every warning of the user's concern said, from now on (or until `warnings.catch_warnings` is left)."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        # Ours are; a library's notes to its own developers are not.
        if issubclass(category, UserWarning):
            say(f"warning: {message}")

    warnings.showwarning = show


@contextlib.contextmanager
def said_as_options(source: str) -> Iterator[None]:
    """Errors and warnings name what was typed, `--held-out` for the spec's field data.held_out; `source` for
    data.source.
    """

    def typed(match: re.Match[str]) -> str:
        return source if match[1] == "source" else f"--{match[1].replace('_', '-')}"

    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        before(_FIELD.sub(typed, str(message)), category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    except UserError as error:
        raise UserError(_FIELD.sub(typed, str(error))) from None
    finally:
        warnings.showwarning = before
