"""Warnings as the user meets them: one line each."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

from pipelines.errors import UserError

_FIELDS = "source|image_size|channels|resize|held_out|drop_duplicates|shard_images|workers"
_FIELD = re.compile(rf"(?<![\w./-])data\.({_FIELDS})\b")
"""A field's name, which is no part of a file's."""


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
def said_as_options(source: str, say: Callable[[str], object]) -> Iterator[None]:
    """Errors, and warnings through `say`, name what was typed: `--held-out` for the spec's field data.held_out,
    `source` for data.source.
    """

    def typed(match: re.Match[str]) -> str:
        return source if match[1] == "source" else f"--{match[1].replace('_', '-')}"

    before = warnings.showwarning
    warnings_to(lambda line: say(_FIELD.sub(typed, line)))
    try:
        yield
    except UserError as error:
        raise UserError(_FIELD.sub(typed, str(error))) from None
    finally:
        warnings.showwarning = before
