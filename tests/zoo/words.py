"""Reads what an error says: which sizes differ, which code it came through."""

from __future__ import annotations

import re
import traceback

__all__ = ["code", "lines", "mismatches"]


def mismatches(text: str) -> list[tuple[int, int]]:
    """The sizes that an error says differ, each way round."""
    patterns = [
        r"\(\d+x(\d+) and (\d+)x\d+\)",
        r"to have (\d+) channels, but got (\d+)",
        r"normalized_shape=\[(\d+)\].*size\[(?:\d+, )*(\d+)\]",
        r"tensor a \((\d+)\).*tensor b \((\d+)\)",
        r"\((\d+)\*\d+\) doesn't match model \((\d+)\*\d+\)",
        r"X1: (\d+) X2: (\d+)",
        r"should contain (\d+) elements not (\d+)",
        r"xpected size (\d+) but got size (\d+)",
    ]
    found = [tuple(map(int, m.groups())) for p in patterns for m in re.finditer(p, text, re.S)]
    return list(dict.fromkeys(pair for a, b in found for pair in ((b, a), (a, b)) if a != b))


def code(error: BaseException | None) -> str:
    """The lines of code outside this folder that an error came through last."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return " ".join(f.line or "" for f in [f for f in frames if "tests/zoo" not in f.filename][-4:])


def lines(error: BaseException) -> tuple[int, ...]:
    """The lines that were reached, from the outside in."""
    lines, tb = [], error.__traceback__
    while tb:
        if "modeling_" in (file := tb.tb_frame.f_code.co_filename) or "/models/" in file:
            lines.append(tb.tb_lineno)
        tb = tb.tb_next
    return tuple(lines)
