"""The two ways in which a verb ends other than well, told apart by the command line's exit code."""


class UserError(ValueError):
    """Bad input: one line that names the field or file and the fix (exit code 2)."""


class Refused(RuntimeError):
    """A gate said no (exit code 3)."""
