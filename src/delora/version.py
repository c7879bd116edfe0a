"""The version of the installed package."""

from __future__ import annotations

from importlib import metadata

__all__ = ["__version__"]

try:
    __version__ = metadata.version("delora")
except metadata.PackageNotFoundError:  # a source tree on the path, never installed
    __version__ = "0+unknown"
