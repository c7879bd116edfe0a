"""The base of all errors that a user can correct. The command line shows their message and no traceback."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["UserError"]


class UserError(Exception):
    """A user's mistake, or something that is missing. The message says what was given, what is known and what to do.

    ``exit_code`` is that of the command line: 1 if something failed, 2 if the call was wrong.

    >>> str(UserError("there is no folder runs/cola"))
    'there is no folder runs/cola'
    """

    exit_code: ClassVar[int] = 1
