"""The base of all errors that a user can correct, and the hints in them: what is nearest to a name that nothing has.

The command line shows their message and no traceback.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar

__all__ = ["UserError", "nearest", "nearest_path"]

MOST = 10_000  # names of a folder that are compared


class UserError(Exception):
    """A user's mistake, or something that is missing. The message says what was given, what is known and what to do.

    ``exit_code`` is that of the command line: 1 if something failed, 2 if the call was wrong.

    >>> str(UserError("there is no folder runs/cola"))
    'there is no folder runs/cola'
    """

    exit_code: ClassVar[int] = 1


def nearest(name: str, known: Sequence[str], show: Callable[[str], str] = str) -> str:
    """A hint: the known name that is most like this one, or all of them if none is. Capital letters make no difference.

    >>> nearest("leaning_rate", ["learning_rate", "steps"])
    'did you mean learning_rate?'
    >>> nearest("depth", ["learning_rate", "steps"])
    'known are learning_rate, steps'
    >>> nearest("TEXT", ["label", "text"], repr)  # names that may have spaces in them
    "did you mean 'text'?"
    """
    close = _closest(name, known)
    return f"did you mean {show(close)}?" if close is not None else f"known are {', '.join(map(show, known))}"


def nearest_path(path: str | os.PathLike[str], others: Iterable[str] = ()) -> str:
    """Words in brackets, for behind a path that leads nowhere: the nearest one that is there; "" if none is near.

    Of the path's parts the first one that is missing is replaced. ``others``: what the whole could have been, apart from paths.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "tickets.csv").write_text("")
    ...     nearest_path(Path(folder, "tickts.csv")).replace(folder, "data")
    ' (did you mean data/tickets.csv?)'
    >>> nearest_path("quickstrat", ["quickstart"])
    ' (did you mean quickstart?)'
    """
    path, others = Path(path), list(others)
    try:
        missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), None)
        if missing is None:
            return ""
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in islice(entries, MOST)]
    except (OSError, ValueError):  # what should be a folder is a file, or the name is none
        missing, names = path, []
    close = _closest(missing.name, [*others, *names])
    if close in names:
        found = missing.parent / str(close)
        whole = found / path.relative_to(missing)
        close = str(whole if whole.exists() else found)
    return f" (did you mean {close}?)" if close is not None else ""


def _closest(name: str, known: Iterable[str]) -> str | None:
    lower = {each.lower(): each for each in known}
    return next((lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=1)), None)
