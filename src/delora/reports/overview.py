"""``delora report``: many runs, of experiments and sweeps, on one page with tables, figures and a CSV file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from delora import tasks
from delora.errors import nearest_path
from delora.formats.files import get, read_json, shown, write_atomically
from delora.reports import figures, pages, samples
from delora.reports.experiment import NOTHING, REPORT
from delora.targets import resolve
from delora.training.config import Experiment, slug
from delora.training.runs import CONFIG, FAILED, METRICS, RESULT, Result, Row, RunError, as_csv, best_rows, read_metrics

__all__ = ["Drawn", "Run", "Table", "collect", "draw", "lines", "norms", "page", "robustness", "safe", "table", "write"]

CSV = "runs.csv"
POINTS = 300  # of a curve, at the most
OVER_RATES = (
    "Score (left) and distance from the base model (right) over factors of each case's base rate. Bands: one standard "
    "deviation over seeds. A cross: at the next factor a run diverges."
)


@dataclass(frozen=True)
class Run:
    """A run: its folder, its settings, its result."""

    folder: Path
    experiment: Experiment
    result: Result


@dataclass(frozen=True)
class Table:
    """A table of the page.

    >>> Table("bert", ["Method", "cola"], [["LoRA", "60.0"]], notes=[]).rows
    [['LoRA', '60.0']]
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


@dataclass(frozen=True)
class Drawn:
    """A figure of the page, with the SVG of its values.

    >>> Drawn("bert: column norms", Path("bert-norms.png"), "By kind of layer and depth.").png.suffix
    '.png'
    """

    title: str
    png: Path
    note: str
    values: str = ""


# ---------------------------------------------------------------- reading


def collect(folders: Sequence[Path], modules: Sequence[str] = ()) -> tuple[list[Run], dict[str, str]]:
    """Every finished run below the folders; and for each failed one, by its folder's name, the reason.

    Args:
        modules: your own modules, of methods and tasks, that the runs may name. No other is imported because a file names it.

    Raises:
        RunError: there is no run; a file is from another version, or names a module that is not in ``modules``.
    """
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"there is no folder {folder}{nearest_path(folder)}")
        runs += [_run(file.parent, modules) for file in sorted(folder.rglob(RESULT))]
        failed |= {file.parent.name: get(read_json(file), "error", str, file) for file in sorted(folder.rglob(FAILED))}
    if not runs:
        raise RunError(
            f"there is no finished run in {', '.join(map(str, folders))}: no {RESULT} of delora train or delora sweep"
        )
    return runs, failed


def _run(folder: Path, modules: Sequence[str]) -> Run:
    run = Run(folder, _experiment(folder / CONFIG, modules), Result.of(read_json(folder / RESULT), folder / RESULT))
    if run.result.task != run.experiment.task:
        raise RunError(
            f"{folder / RESULT} is damaged: it is of the task {shown(run.result.task)}, {CONFIG} of {run.experiment.task!r}"
        )
    read_metrics(folder / METRICS)
    return run


def _experiment(file: Path, modules: Sequence[str]) -> Experiment:
    data = read_json(file)
    for name in tasks.own_names(data):
        if name.partition(":")[0] not in modules:
            raise RunError(
                f"{file} names {name!r}, and nothing is imported because a file says so: if that module is yours, add "
                f"--module {name.partition(':')[0]}"
            )
    return tasks.parse(data, where=str(file))


def lines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of the CSV file: for each run its settings and all values of its result."""
    rows = []
    for run in runs:
        e, r = run.experiment, run.result
        rows.append(
            {
                "model": e.model,
                "task": e.task,
                "row": r.row,
                "setting": r.setting,
                "seed": r.seed,
                "factor": e.factor,
                "method": r.method,
                "lr": e.train.lr,
                "lam_lr": e.train.lam_lr,
                "trainable": r.trainable,
                "metric": r.metric,
                "validation": r.validation,
                "reported": r.reported,
                "test": r.test,
                "best_epoch": r.best_epoch,
                "distance": r.distance,
                "bound_used": r.bound_used,
                "diverged": r.diverged,
                "seconds": r.seconds,
                **{f"test {name}": value for name, value in r.scores.items()},
            }
        )
    return rows


# ---------------------------------------------------------------- tables


def table(model: str, runs: Sequence[Run]) -> Table:
    """Methods by tasks, as in Tables 4, 5 and 8: for each row its best setting by validation, mean ± deviation over seeds.

    The paper's score stands below ours if the model and the task are the paper's.
    """
    columns: dict[tuple[str, str], None] = {}
    for run in runs:
        name, task = run.experiment.task, tasks.find(run.experiment.task)
        beside = task.columns(run.experiment)
        columns |= dict.fromkeys((name, score) for score in run.result.scores if score in beside)
        columns[name, run.result.reported] = None
        columns |= dict.fromkeys((name, score) for score in run.result.scores if score.startswith(task.NOT_SHARES))
    experiments = {id(run.result): run.experiment for run in runs}
    rows: dict[str, dict[tuple[str, str], Row]] = {}
    for row in best_rows([run.result for run in runs]):
        for column in columns:
            if column[0] == row.runs[0].task and (column[1] == row.runs[0].reported or column[1] in row.runs[0].scores):
                rows.setdefault(row.name, {})[column] = row
    names = {task for task, _ in columns}
    mean = len(names) > 1 and len(columns) == len(names)
    body = []
    for name, cells in rows.items():
        first = next(iter(cells.values())).runs[0]
        line = [name, f"{first.trainable:,}"]
        line += [_cell(cells.get(column), column[1], experiments) for column in columns]
        if mean:
            values = [_mean(cells[column], column[1]) for column in columns if column in cells]
            line.append(f"{statistics.fmean(values):.1f}" if len(values) == len(columns) else NOTHING)
        body.append(line)
    head = [f"{task} {name}" if len(names) > 1 else name for task, name in columns]
    seeds = sorted({run.result.seed for run in runs})
    notes = [
        f"± is the standard deviation over seeds ({', '.join(map(str, seeds))}); no ± means one seed. Scores are in percent, "
        "except perplexities and FID. Of the settings of a row, the best by validation is shown.",
    ]
    if any(run.experiment.published and run.experiment.published.of(run.experiment) for run in runs):
        notes.append("“paper”: the paper's score for this model and task.")
    return Table(model, ["Method", "Trainable", *head, *(["mean"] if mean else [])], body, notes)


def _value(result: Result, name: str) -> float | None:
    return result.test if name == result.reported else result.scores.get(name)


def _mean(row: Row, name: str) -> float:
    values = row.values(lambda r: _value(r, name))
    return 100 * statistics.fmean(values) if values else math.nan


def _cell(row: Row | None, name: str, experiments: dict[int, Experiment]) -> str:
    if row is None:
        return NOTHING
    unit = 1 if name.startswith(tasks.find(row.runs[0].task).NOT_SHARES) else 100
    values = [unit * value for value in row.values(lambda r: _value(r, name))]
    text = "diverged"
    if values:
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        text = f"{statistics.fmean(values):.1f}{spread}"
        if row.diverged:
            text += f" ({len(row.diverged)} of {len(row.runs)} diverged)"
    experiment = experiments[id(row.runs[0])]
    known = experiment.published
    if known is not None and known.of(experiment):
        paper = known.test if name == row.runs[0].reported else known.scores.get(name)
        if paper is not None:
            spread = f" ± {known.deviation:.1f}" if known.deviation is not None and name == row.runs[0].reported else ""
            text += f"\npaper {paper:.1f}{spread}"
    return text


def robustness(runs: Sequence[Run]) -> Table:
    """How much of its best score each case keeps over factors of its base rate. See ``docs/robustness.md``."""
    body = []
    for case, of_case in _cases(runs).items():
        by_factor: dict[float, list[Result]] = {}
        for run in of_case:
            by_factor.setdefault(run.experiment.factor or 1.0, []).append(run.result)
        means = {f: (statistics.fmean(v) if None not in v else -math.inf) for f, v in _sorted(by_factor, lambda r: r.test)}
        best = max(means, key=lambda f: means[f])
        if means[best] == -math.inf:
            body.append([case, "diverged", NOTHING, NOTHING, NOTHING, NOTHING])
            continue
        low, high = safe(means, by_factor)
        growth = " to ".join(_distance(by_factor[f]) for f in (best, max(by_factor)))
        lost = [f for f, score in means.items() if score == -math.inf]
        worst = min((score for score in means.values() if score > -math.inf), default=math.nan)
        worst_score = f"{100 * worst:.1f}" + (f"; diverges at {', '.join(f'{f:g}' for f in lost)}" if lost else "")
        body.append([case, f"{100 * means[best]:.1f}", f"{best:g}", f"{low:g} to {high:g}", worst_score, growth])
    header = ["Case", "Best [%]", "at factor", "Safe factors", "Worst [%]", "|dW|/|W| (best to largest factor)"]
    notes = [
        "Factors multiply the learning rates of the adapter and of lam. Safe: the factors around the best one at which the "
        "mean score is within one point of the best or, if that is more, within the best one's standard deviation."
    ]
    return Table("Is the learning rate safe?", header, body, notes)


def _distance(results: Sequence[Result]) -> str:
    values = [r.distance for r in results if r.distance is not None]
    return f"{statistics.fmean(values):.2f}" if values else NOTHING


def safe(means: dict[float, float], results: dict[float, list[Result]]) -> tuple[float, float]:
    """The smallest and largest of the neighbouring factors around the best one at which the mean score stays near the best.

    Near is within max(0.01, the standard deviation at the best factor).

    >>> safe({0.25: 0.60, 1.0: 0.70, 4.0: 0.695, 16.0: 0.50}, {1.0: []})
    (1.0, 4.0)
    """
    order = sorted(means)
    best = max(order, key=lambda f: means[f])
    scores = [r.test for r in results[best] if r.test is not None]
    least = means[best] - max(0.01, statistics.stdev(scores) if len(scores) > 1 else 0.0)
    low = high = order.index(best)
    while low > 0 and means[order[low - 1]] >= least:
        low -= 1
    while high + 1 < len(order) and means[order[high + 1]] >= least:
        high += 1
    return order[low], order[high]


def _sorted(by_factor: dict[float, list[Result]], value: Callable[[Result], float | None]) -> list[tuple[float, list[Any]]]:
    return [(factor, [value(r) for r in results]) for factor, results in sorted(by_factor.items())]


def _cases(runs: Sequence[Run]) -> dict[str, list[Run]]:
    by_row: dict[str, list[Run]] = {}
    for run in runs:
        by_row.setdefault(run.result.row, []).append(run)
    return by_row


# ---------------------------------------------------------------- figures


def draw(title: str, runs: Sequence[Run], out: Path) -> list[Drawn]:
    """For runs on one task: score and distance over factors (as in Figures 2, 5, 6) and over steps (as in Figure 3)."""
    drawn = []
    scaled = [run for run in runs if run.experiment.factor is not None]
    stem = slug(title)
    if len({run.experiment.factor for run in scaled}) > 1:
        rows = [
            {"case": run.result.row, "factor": run.experiment.factor, "distance": run.result.distance}
            | ({} if run.result.test is None else {"score": run.result.test})
            for run in scaled
        ]
        figure = figures.over_rates(rows, list(_cases(scaled)), runs[0].result.reported, "|dW| / |W|")
        png, _ = figures.save(figure, out / f"{stem}-rates")
        note = OVER_RATES
        drawn.append(Drawn(f"{title}: over learning rates", png, note, pages.spots(figure)))
    best = best_rows([run.result for run in runs])
    kept = {id(result) for row in best for result in row.runs}
    points = [point for run in runs if id(run.result) in kept for point in _points(run)]
    if any("distance" in point for point in points):
        cases = [row.name for row in best]
        bounded = next((case for case in cases if any(p["case"] == case and "bound" in p for p in points)), None)
        figure = figures.over_steps(points, cases, bounded, runs[0].result.metric, "|dW| / |W|")
        png, _ = figures.save(figure, out / f"{stem}-steps")
        note = "Distance from the base model (left) and validation score (right) over training, for each row's best setting."
        drawn.append(Drawn(f"{title}: over training", png, note, pages.spots(figure)))
    folders = {id(run.result): run.folder for run in runs}
    made = {row.name: tasks.find(row.runs[0].task).snapshots(folders[id(row.runs[0])]) for row in best}  # of its first seed
    if sheet := samples.sheet(made, out / f"{stem}-samples.png"):
        note = "The same noise and prompt after more and more steps of training, for each row's best setting."
        drawn.append(Drawn(f"{title}: samples over training", sheet, note))
    return drawn


def norms(experiment: Experiment, out: Path) -> Drawn:
    """Figure 4: the mean column norms of an experiment's frozen targets, by kind and depth. Loads the model."""
    model, adapter = tasks.find(experiment.task).base(experiment), experiment.adapter
    names = resolve(model, adapter.build(), adapter.targets, exclude=adapter.exclude)[0]
    figure = figures.column_norm_profile(model, list(names))
    png, _ = figures.save(figure, out / f"{slug(experiment.model)}-norms")
    note = "The mean norm of the frozen weights' columns, by which DeLoRA scales its directions, by kind of layer and depth."
    return Drawn(f"{experiment.model}: column norms", png, note, pages.spots(figure))


def _points(run: Run) -> list[dict[str, Any]]:
    """A run's curve: about `POINTS` steps, and all validated ones; each step once."""
    file = run.folder / METRICS
    steps: dict[int, dict[str, Any]] = {}
    for row in read_metrics(file):
        steps.setdefault(row["step"], {}).update(row)
    metric = f"validation_{run.result.metric}"
    order = sorted(steps)
    chosen = {*order[:: max(1, len(order) // POINTS)], *(s for s in order if metric in steps[s])}
    points = []
    for step in sorted(chosen):
        row = steps[step]
        point = {"case": run.result.row, "step": step}
        if "distance" in row:
            point["distance"] = row["distance"]
            if row.get("bound_used"):
                point["bound"] = row["distance"] / row["bound_used"]
            if "reach" in row:
                point["reachable"] = row["reach"]
        if metric in row:
            point["score"] = row[metric]
        points.append(point)
    return points


# ---------------------------------------------------------------- the page


def write(folders: Sequence[Path], out: Path, with_norms: bool = False, modules: Sequence[str] = ()) -> Path:
    """Write ``report.html``, ``runs.csv`` and the figures of all runs below the folders into ``out``.

    ``with_norms``: also Figure 4 of each model. ``modules``: as for `collect`.

    Raises:
        RunError: there is no run, or ``out`` holds other things. Then nothing is written.
    """
    runs, failed = collect(folders, modules)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / REPORT).is_file())):
        raise RunError(f"{out} is not empty and holds no report: choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    tables, drawn = [], []
    for model in dict.fromkeys(run.experiment.model for run in runs):
        of_model = [run for run in runs if run.experiment.model == model]
        tables.append(table(model, of_model))
        for task in dict.fromkeys(run.experiment.task for run in of_model):
            part = [run for run in of_model if run.experiment.task == task]
            if len({run.experiment.factor for run in part if run.experiment.factor is not None}) > 1:
                tables.append(robustness([run for run in part if run.experiment.factor is not None]))
            drawn += draw(f"{model}, {task}", part, out)
        if with_norms:
            drawn.append(norms(of_model[0].experiment, out))
    write_atomically(out / CSV, as_csv(lines(runs)).encode())
    write_atomically(out / REPORT, page(runs, failed, tables, drawn).encode())
    return out / REPORT


def page(runs: Sequence[Run], failed: dict[str, str], tables: Sequence[Table], drawn: Sequence[Drawn]) -> str:
    """The text of ``report.html``, with the figures inside it.

    >>> "<h2>bert</h2>" in page([], {}, [Table("bert", ["Method"], [["LoRA"]], [])], [])
    True
    """

    parts = []
    for one in tables:
        notes = "".join(f"<li>{escape(note)}</li>" for note in one.notes)
        parts.append(f"<h2>{escape(one.title)}</h2>\n{pages.table(one.header, one.rows)}\n<ul>{notes}</ul>")
    parts += [f"<h2>{escape(d.title)}</h2>\n{pages.picture(d.png, d.title, d.values, d.note)}" for d in drawn]
    if failed:
        why = "".join(f"<li><b>{escape(name)}</b>: {escape(reason)}</li>" for name, reason in failed.items())
        parts.append(f"<h2>Failed</h2>\n<ul>{why}</ul>")
    hours = sum(run.result.seconds for run in runs) / 3600
    what = f"""<h1>{len(runs)} runs</h1>
<p class="what">{hours:.1f} hours of training; {len(failed)} failed.
Every number is in {CSV}; the figures are beside it as PNG and PDF.</p>"""
    return pages.document("delora report", "\n".join([what, *parts]))
