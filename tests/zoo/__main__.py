"""The census of model types: ``python -m tests.zoo --built``; ``--all`` tries those that were not built before, too."""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

from tests.zoo.census import KINDS, Row, as_json, census, table

KNOWN = 3.0  # the patience with types that were built before, perhaps by a faster machine
LEAST = 650  # types of transformers that have to be built
PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


def page(rows: list[Row], least: int) -> str:
    """The page of the documentation: the counts, the types by outcome, and those that are not built, with reasons."""
    built = [row for row in rows if row.built]
    own = sum(":" not in row.kind for row in built)
    lines = [
        "# The zoo: every architecture at hand",
        "",
        "Written by `python -m tests.zoo --all --write`. Tiny random models are made from the configuration classes of the",
        'installed transformers and diffusers, adapted by `DeLoRA(r=4)` on `"all-linear"`, and put to the laws below.',
        f"{len(built)} of {len(rows)} types are built, {own} of them of transformers; fewer than {least} of these are a",
        "failure, as is one wrong outcome.",
        "",
        "*named*: the library itself names the layers for which the law does not hold, in a warning or in its summary.",
        "*refused*: an error in words. *wrong*: anything else. *skipped*: the base model, transformers or PEFT cannot do",
        "the same without this library, or the type's time had passed.",
        "",
        table(rows),
        "",
    ]
    for kind in ("wrong", "refused", "named"):
        found = sorted(row.kind for row in built if row.outcome() == kind)
        lines += [f"## {kind.capitalize()} ({len(found)})", "", ", ".join(found) or "None.", ""]
        if kind != "named":
            lines += [f"- {_line(row)}" for row in sorted(built, key=lambda r: r.kind) if row.outcome() == kind]
            lines += [""] if found else []
    right = sorted(row.kind for row in built if row.outcome() == "right")
    lines += [f"## Right ({len(right)})", "", ", ".join(right) or "None.", "", f"## Not built ({len(rows) - len(built)})", ""]
    lines += [f"- {row.kind}: {_escaped(row.why)[:240]}" for row in sorted(rows, key=lambda r: r.kind) if not row.built]
    return "\n".join(lines) + "\n"


def not_built(text: str) -> set[str]:
    """The types that the page lists as not built."""
    return set(re.findall(r"^- (\S+): ", text.partition("## Not built")[2], re.MULTILINE))


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").split())


def _line(row: Row) -> str:
    bad = [f"{law}: {kind}: {_escaped(words)[:200]}" for law, (kind, words) in row.laws.items() if kind in ("wrong", "refused")]
    return f"{row.kind} ({row.model}): " + "; ".join(bad)


def _until(kinds: Iterable[str], end: float) -> Iterator[str]:
    """The types, as long as there is time."""
    for kind in kinds:
        if time.monotonic() > end:
            return
        yield kind


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("types", nargs="*", help="types such as bert or diffusers:UNet2DConditionModel")
    parser.add_argument("--all", action="store_true", help="every type")
    parser.add_argument("--built", action="store_true", help=f"every type but those that {PAGE.name} lists as not built")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--least", type=int, default=LEAST, help="with --all or --built: how many types of transformers have to be built"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="begin no further type after so many; the order is then another one each day, so that a slow machine comes to all",
    )
    parser.add_argument("--build", action="store_true", help="only build, without the laws")
    parser.add_argument("--write", action="store_true", help="write docs/zoo.md")
    parser.add_argument("--rows", type=Path, help="also write every row to this file, as JSON")
    args = parser.parse_args()
    from tests.zoo.build import types

    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    start, rows = time.monotonic(), []
    kinds = types() if args.all or args.built else args.types
    if args.built:
        kinds = [kind for kind in kinds if kind not in not_built(PAGE.read_text())]
    every = len(kinds)
    if args.minutes is not None:
        kinds = sorted(kinds)
        random.Random(date.today().toordinal()).shuffle(kinds)
        kinds = _until(kinds, start + 60 * args.minutes)
    for row in census(kinds, args.processes, not args.build, KNOWN if args.built else 1.0):
        rows.append(row)
        if not row.built:
            print(f"{row.kind}: not built: {row.why[:300]}", flush=True)
        for law, (kind, words) in row.laws.items():
            if kind != "right" and not (kind == "skipped" and words == "not injected"):
                print(f"{row.kind} ({row.model}) {law}: {kind}: {words[:300]}", flush=True)
        if args.rows:
            with args.rows.open("a") as file:
                file.write(as_json(row) + "\n")
    built, count = sum(row.built for row in rows), Counter(row.outcome() for row in rows if row.built)
    print(f"\n{table(rows)}\n\n{len(rows)} types, {built} built, in {time.monotonic() - start:.0f} seconds: ", end="")
    print(", ".join(f"{kind} {count[kind]}" for kind in KINDS[:-1]))
    for row in rows:
        if row.outcome() == "wrong":
            print(_line(row))
    if args.write:
        PAGE.write_text(page(rows, args.least))
    if len(rows) < every:
        print(f"{every - len(rows)} of {every} types were not begun within {args.minutes:g} minutes")
    own = sum(row.built for row in rows if ":" not in row.kind)
    whole = (args.all or args.built) and len(rows) == every
    few = whole and own < args.least
    if few:
        print(f"only {own} types of transformers were built: fewer than {args.least}")
    return int(bool(few or count["wrong"] or (args.types and built < len(rows))))


if __name__ == "__main__":
    sys.exit(main())
