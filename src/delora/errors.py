"""What a user can set right: one kind of error, told as one message and never as a traceback."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["UserError"]


class UserError(Exception):
    """A user's mistake, or something that is missing. Its text says what came, what is known and what to do.

    ``exit_code`` is that of the command line: 1 where something failed, 2 where it was called wrongly.

    >>> str(UserError("there is no folder runs/cola"))
    'there is no folder runs/cola'
    """

    exit_code: ClassVar[int] = 1
