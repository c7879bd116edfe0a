"""The examples in docstrings as blocks of code, for mkdocstrings: it knows them in a section "Examples" alone."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^Example:\n)?^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)


def fenced(text: str) -> str:
    """The text with each run of lines that begins with ``>>>`` between fences.

    >>> fenced("Adds.\\n\\n>>> 1 + 1\\n2\\n\\nEnds.").split("\\n")
    ['Adds.', '', '```pycon', '>>> 1 + 1', '2', '```', '', 'Ends.']
    """

    def fence(match: re.Match[str]) -> str:
        indent = match[1]
        lines = [line.removeprefix(indent) for line in match[0].removeprefix("Example:\n").split("\n")]
        return "\n".join(["```pycon", *lines, "```"])

    return EXAMPLE.sub(fence, text)


class Fences(griffe.Extension):
    """Fences the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
