"""Examples of one or two texts, the labels and metrics of a task on texts, and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from delora.errors import UserError

__all__ = ["DataError", "Example", "Splits", "TextTask"]

T = TypeVar("T")


class DataError(UserError, ValueError):
    """The data are not there, not what they should be, or too few."""


@dataclass(frozen=True)
class Example:
    """``label`` is the index of a class, or the target of a regression. ``pair`` is the second text, if there is one."""

    text: str
    label: float
    pair: str | None = None


@dataclass(frozen=True)
class TextTask:
    """``labels`` are the classes; a single one names the target of a regression.

    ``metrics`` are keys of `delora.evaluation.text.METRICS`: the first one selects the epoch, ``reported`` is the paper's.
    """

    labels: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def reported(self) -> str:
        return "average" if "average" in self.metrics else self.metrics[0]

    @property
    def regression(self) -> bool:
        return len(self.labels) == 1


@dataclass(frozen=True)
class Splits(Generic[T]):
    train: list[T]
    validation: list[T]
    test: list[T]
