"""What all readers of data share: examples of one or two texts, a task's labels and metrics, its three parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from delora.errors import UserError

__all__ = ["DataError", "Example", "Splits", "TextTask"]

T = TypeVar("T")


class DataError(UserError, ValueError):
    """The data are missing, malformed, or too few.

    >>> isinstance(DataError("there is no folder mine"), ValueError)
    True
    """


@dataclass(frozen=True)
class Example:
    """One example. ``label`` is the index of a class, or the target of a regression; ``pair`` is the second text, if any.

    >>> Example("A fine film.", label=1)
    Example(text='A fine film.', label=1, pair=None)
    """

    text: str
    label: float
    pair: str | None = None


@dataclass(frozen=True)
class TextTask:
    """A task on texts. ``labels`` are the classes; a single one names the target of a regression.

    ``metrics`` are keys of `delora.evaluation.text.METRICS`: the first one selects the epoch, ``reported`` is the paper's.

    >>> rating = TextTask(labels=("rating",), metrics=("pearson", "spearman", "average"))
    >>> rating.regression, rating.reported
    (True, 'average')
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
    """The parts of a data set: to train on, to choose settings by, to test once.

    >>> Splits(train=[1, 2], validation=[3], test=[4]).train
    [1, 2]
    """

    train: list[T]
    validation: list[T]
    test: list[T]
