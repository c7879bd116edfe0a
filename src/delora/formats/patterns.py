"""PEFT's patterns of layer names, matched as PEFT matches them, but in a time that is bounded whatever they are.

Python's ``re`` tries one way after the other, and for ``(.*)*(.*)*!`` there are more ways than can ever be tried. Here the set
of all places that can be reached in the name is followed instead: a pattern costs at most a few times its length for each
character, and what costs more than about a second is an error.
"""

from __future__ import annotations

import re
import re._constants as codes  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from delora.formats.files import AdapterError, shown

__all__ = ["LONGEST", "Pattern", "Patterns", "Steps"]

MOST, LONGEST, TEXT = 10_000, 1_000, 100_000  # patterns; characters of one, or of a name; of all regular expressions together
DEEPEST = 20  # brackets in brackets
STEPS = 4_000_000  # about a second
PLAIN = re.compile(r"[\w.-]+")

_IS: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    codes.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    codes.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class Steps:
    """How many steps are left; what needs more is an AdapterError.

    >>> steps = Steps("adapter_config.json: rank_pattern", left=1)
    >>> steps.take(2)
    Traceback (most recent call last):
    delora.formats.files.AdapterError: adapter_config.json: rank_pattern: these patterns take too long to match
    """

    def __init__(self, where: str, left: int = STEPS) -> None:
        self.where, self.left = where, left

    def take(self, count: int) -> None:
        """Take some of the steps."""
        self.left -= count
        if self.left < 0:
            raise AdapterError(f"{self.where}: these patterns take too long to match")


class Pattern:
    """A regular expression without back-references, look-behind, flags and atomic groups.

    >>> pattern = Pattern(r"layers\\.(0|2)\\..*_proj", Steps("target_modules"))
    >>> pattern.ends("layers.2.self_attn.q_proj", {0})  # here the match that begins at 0 may end
    {25}
    """

    def __init__(self, text: str, steps: Steps) -> None:
        self.text, self.steps = text, steps
        if len(text) > LONGEST:
            raise AdapterError(f"{steps.where} has a pattern of {len(text):,} characters; at most {LONGEST:,} are read")
        try:
            parsed = parser.parse(text)
            self.items = _joined(parsed)
        except (re.error, RecursionError, OverflowError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise AdapterError(f"{steps.where} has {shown(text)}, no regular expression: {why}") from error
        if parsed.state.flags & ~re.UNICODE:
            self._refuse("flags")

    def ends(self, name: str, places: set[int]) -> set[int]:
        """Where in the name a match can end that begins at one of the places."""
        return self._ends(self.items, name, places)

    def _ends(self, items: list[Any], name: str, places: set[int]) -> set[int]:
        for code, value in items:
            if not places:
                break
            self.steps.take(4 + len(places))
            places = self._step(code, value, name, places)
        return places

    def _step(self, code: Any, value: Any, name: str, places: set[int]) -> set[int]:
        size = len(name)
        if code == "text":
            return {i + len(value) for i in places if name.startswith(value, i)}
        if code in (codes.NOT_LITERAL, codes.ANY, codes.IN):
            return {i + 1 for i in places if i < size and _fits(code, value, name[i])}
        if code is codes.BRANCH:
            return set().union(*(self._ends(branch, name, places) for branch in value[1]))
        if code is codes.SUBPATTERN and not value[1] | value[2]:
            return self._ends(value[3], name, places)
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, repeated = value
            return self._repeated(least, most, repeated, name, places)
        if code is codes.AT and value in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
            return places & {0}
        if code is codes.AT and value in (codes.AT_END, codes.AT_END_STRING):
            return places & {size}
        if code in (codes.ASSERT, codes.ASSERT_NOT) and value[0] > 0:
            return {i for i in places if bool(self._ends(value[1], name, {i})) == (code is codes.ASSERT)}
        return self._refuse(str(code).lower())

    def _repeated(self, least: int, most: int, items: list[Any], name: str, places: set[int]) -> set[int]:
        if items == [(codes.ANY, None)] and most is codes.MAXREPEAT:
            return set(range(min(places) + least, len(name) + 1))
        count = 0
        while count < least and places:
            before, places = places, self._ends(items, name, places)
            count = least if places == before else count + 1  # from here on nothing changes any more
        reached = new = places
        while new and count < most:
            new = self._ends(items, name, new) - reached
            reached = reached | new
            count += 1
        return reached

    def _refuse(self, what: str) -> Any:
        raise AdapterError(f"{self.steps.where} has {shown(self.text)}: patterns with {what} are not read; write it without")


def _joined(items: Any, depth: int = 0) -> list[Any]:
    """A parsed expression as plain lists, in which characters that follow each other are one text."""
    if depth > DEEPEST:
        raise RecursionError
    joined: list[Any] = []
    for code, value in items:
        if code is codes.LITERAL and joined and joined[-1][0] == "text":
            joined[-1] = ("text", joined[-1][1] + chr(value))
        elif code is codes.LITERAL:
            joined.append(("text", chr(value)))
        elif code is codes.BRANCH:
            joined.append((code, (None, [_joined(branch, depth + 1) for branch in value[1]])))
        elif code in (codes.SUBPATTERN, codes.MAX_REPEAT, codes.MIN_REPEAT, codes.ASSERT, codes.ASSERT_NOT):
            joined.append((code, (*value[:-1], _joined(value[-1], depth + 1))))
        else:
            joined.append((code, value))
    return joined


def _fits(code: Any, value: Any, c: str) -> bool:
    if code is codes.ANY:
        return c != "\n"
    if code is codes.NOT_LITERAL:
        return bool(ord(c) != value)
    negated = value[0][0] is codes.NEGATE
    return negated != any(_in(kind, part, c) for kind, part in value[negated:])


def _in(kind: Any, part: Any, c: str) -> bool:
    if kind is codes.CATEGORY:
        return _IS[part](c)
    low, high = part if kind is codes.RANGE else (part, part)
    return bool(low <= ord(c) <= high)


class Patterns:
    """Values by pattern: PEFT's ``rank_pattern`` and its kin. The first pattern that fits the end of a name counts.

    A pattern fits the whole name, or what follows a dot in it: PEFT's ``(.*\\.)?(pattern)$``.

    >>> ranks = Patterns({"q": 4, r"layers\\.[01]\\..*": 2}, "rank_pattern")
    >>> ranks.get("layers.7.q", 8), ranks.get("layers.1.v", 8), ranks.get("layers.7.v", 8)
    (4, 2, 8)
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.steps = Steps(where)
        if len(values) > MOST:
            raise AdapterError(f"{where} has {len(values):,} patterns; at most {MOST:,} are read")
        expressions = [text for text in values if not PLAIN.fullmatch(text)]
        if (characters := sum(map(len, expressions))) > TEXT:
            raise AdapterError(f"{where} has regular expressions of {characters:,} characters; at most {TEXT:,} are read")
        compiled = {text: Pattern(text, self.steps) for text in expressions}
        self.values = list(values.values())
        self.expressions = [(i, compiled[text]) for i, text in enumerate(values) if text in compiled]
        self.plain: dict[str, list[tuple[int, list[str]]]] = {}  # by the last part
        for i, text in enumerate(values):
            if text not in compiled:
                parts = text.split(".")
                self.plain.setdefault(parts[-1], []).append((i, parts))

    def get(self, name: str, default: Any) -> Any:
        """The value of the first pattern that fits the name, or the default."""
        if len(name) > LONGEST:
            raise AdapterError(
                f"{self.steps.where}: a name of {len(name):,} characters is no layer's; at most {LONGEST:,} are read"
            )
        first = min((i for i in self._fitting(name)), default=None)
        return default if first is None else self.values[first]

    def _fitting(self, name: str) -> Iterator[int]:
        """The indices of plain patterns that fit, and of the first expression that does."""
        last = name.rpartition(".")[2]
        for k in range(len(last) + 1):
            yield from (i for i, parts in self.plain.get(last[k:], ()) if self._ends_with(parts, name))
        places = {0} | {i + 1 for i, c in enumerate(name) if c == "."}
        for i, pattern in self.expressions:
            if len(name) in pattern.ends(name, places):
                yield i
                break

    def _ends_with(self, parts: list[str], name: str) -> bool:
        """Whether a name ends with these parts. As a dot in a pattern says, any character may stand between two of them."""
        end = len(name)
        for part in reversed(parts):
            self.steps.take(1)
            start = end - len(part)
            if start < 0 or not name.endswith(part, start, end):
                return False
            end = start - 1
        return end < 0 or name[end] == "."
