"""Rows divided into training, validation and test: by class, by a seed, and never one text or one group in two parts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = ["divide", "units"]

SHARE = 0.1  # of the rows, for each of validation and test


def units(*keys: Sequence[Hashable]) -> list[int]:
    """The unit of each row: rows that share any key, also by way of other rows, are of one unit. A key None joins nothing.

    >>> units(["a", "b", "a", "c"], [1, 2, 3, 2])
    [0, 1, 0, 1]
    """
    parent = list(range(len(keys[0])))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for key in keys:
        first: dict[Hashable, int] = {}
        for i, value in enumerate(key):
            if value is not None:
                a, b = sorted((root(first.setdefault(value, i)), root(i)))
                parent[b] = a
    return [root(i) for i in range(len(parent))]


def divide(
    unit: Sequence[int],
    label: Sequence[str],
    parts: Sequence[str] = ("validation", "test"),
    seed: int = 0,
    share: float = SHARE,
) -> list[str]:
    """The part of each row: "train", or one of ``parts``, each of which gets about ``share`` of every class's rows.

    The rows of a unit stay together; a unit counts to the class that most of its rows have. A class of few units gives its
    first to training; none is in the other parts alone.

    >>> parts = divide(range(20), ["a", "b"] * 10)
    >>> parts.count("train"), parts.count("validation"), parts.count("test")
    (16, 2, 2)
    """
    members: dict[int, list[int]] = {}
    for row, each in enumerate(unit):
        members.setdefault(each, []).append(row)
    strata: dict[str, list[int]] = {}
    for each, rows in members.items():
        most = Counter(label[row] for row in rows).most_common(1)[0][0]
        strata.setdefault(most, []).append(each)
    draw, chosen = random.Random(seed), dict.fromkeys(members, "train")
    for stratum in sorted(strata):
        these = strata[stratum]
        draw.shuffle(these)
        total = sum(len(members[each]) for each in these)
        rest = iter(these[: max(0, len(these) - 1)])  # the last one is for training
        for part in parts[::-1]:
            wanted, got = max(1, round(share * total)), 0
            while got < wanted and (taken := next(rest, None)) is not None:
                chosen[taken], got = part, got + len(members[taken])
    trained = {label[row] for each, rows in members.items() if chosen[each] == "train" for row in rows}
    for row, name in enumerate(label):  # a class that no unit is counted to may be outside training
        if name not in trained:
            chosen[unit[row]] = "train"
            trained |= {label[other] for other in members[unit[row]]}
    return [chosen[each] for each in unit]
