"""Warnings as the user meets them: one line each."""

import warnings
from collections.abc import Callable
from typing import TextIO


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
