"""Methods and tasks of a user's own, by the name of their module: ``mymethods:Outer``, ``mytasks.tickets``.

Modules are searched in the working folder and among the installed packages, as ``python -m`` does. A name comes from the
command line, or from a recipe named there; a name in any other file never causes an import.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from delora.errors import UserError, nearest, nearest_path

__all__ = ["OutsideError", "method", "module"]


class OutsideError(UserError, ValueError):
    """There is no such module or class, or it is not a method or task.

    >>> OutsideError.exit_code
    2
    """

    exit_code: ClassVar[int] = 2


def module(name: str) -> ModuleType:
    """The module of this dotted name.

    Raises:
        OutsideError: it cannot be imported; the message says where it was searched, or which error it raised.

    >>> module("json").__name__
    'json'
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            file = Path(*name.split(".")).with_suffix(".py")
            raise OutsideError(
                f"there is no module {name!r}, neither in {here} nor among the installed packages{nearest_path(file)}"
            ) from error
        raise OutsideError(f"{name} imports {error.name!r}, which is not installed") from error
    except Exception as error:  # whatever a user's own file raises
        raise OutsideError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def method(name: str) -> type:
    """The method class of a name ``module:Class``: a dataclass with ``init`` and ``update``.

    Raises:
        OutsideError: there is no such class, or it is not a method; the message says what it lacks.

    >>> method("delora.methods:LoRA").__name__
    'LoRA'
    """
    where, _, attribute = name.partition(":")
    if not where or not attribute.isidentifier():
        raise OutsideError(f"{name!r}: a method of your own is written module:Class, such as mymethods:Outer")
    source = module(where)
    cls = getattr(source, attribute, None)
    if cls is None:
        classes = [key for key, value in vars(source).items() if isinstance(value, type) and value.__module__ == where]
        raise OutsideError(f"{where} has no class {attribute!r}; {nearest(attribute, classes) if classes else 'it has none'}")
    missing = [key for key in ("init", "update") if not callable(getattr(cls, key, None))]
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls) or missing:
        lacks = f"it has no {' and no '.join(missing)}" if missing else "it is none"
        raise OutsideError(f"{name} is no method: a method is a dataclass with init(W) and update(W, p), and {lacks}")
    return cls
