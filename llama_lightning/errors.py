"""Errors a user can mend: one line that says what, where and what to do.

The command line prints the message alone and exits with the class's code. Anything that is not one
of these is our own fault and keeps its traceback.
"""


class UserError(ValueError):
    """Base of all errors a user can mend."""

    exit_code = 3


class UsageError(UserError):
    """A wrong command line or configuration."""

    exit_code = 2


class DataError(UserError):
    """A data file or a tokenizer that cannot be used."""


class WeightsError(UserError):
    """A base model folder that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used, or that contradicts the configuration."""


class JudgeError(UserError):
    """A judge that cannot grade, or files of its that cannot be used."""
