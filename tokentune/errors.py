"""What a command says to its user: messages on the way, and errors that the user can cure, on which it ends.

Bad input is told in one to three lines (what is wrong, where, what to do) and exit code 2, without a traceback.
A traceback means a defect in TokenTune, so everything that is not a `UserError` is left to propagate.
"""


class UserError(Exception):
    """What is wrong, where (file, row, flag) and what to do: a message of one to three lines."""


class UnsupportedModelError(ValueError):
    """A model that the selective layers cannot serve exactly. The message says which part of it, and why."""
