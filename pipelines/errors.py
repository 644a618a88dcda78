"""The ways in which a verb ends other than well, told apart by the command line's exit code."""


class UserError(ValueError):
    """Bad input: one line that names the field or file and the fix (exit code 2)."""


class Failed(RuntimeError):
    """The work itself went wrong in a way that is known: one line that says what and what to try (exit code 1)."""


class Refused(RuntimeError):
    """A gate said no (exit code 3)."""
