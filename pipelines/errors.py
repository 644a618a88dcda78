"""The ways in which a verb ends other than well, told apart by the command line's exit code."""

from collections.abc import Mapping
from typing import Any


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of bearable length; its kind where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class UserError(ValueError):
    """Bad input: one line that names the field or file and the fix (exit code 2)."""


class Failed(RuntimeError):
    """The work itself went wrong in a way that is known: one line that says what and what to try (exit code 1)."""


class Diverged(Failed):
    """A training's numbers are not finite any more: all ranks know it, and going back would meet the same bits."""


class Refused(RuntimeError):
    """A gate said no (exit code 3)."""

    def __init__(self, message: str, decision: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.decision = decision
        self.result: Any = None
        """What the verb had come to by then, where it had: a no is a result too."""
