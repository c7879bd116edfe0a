"""A grid of runs of one recipe, on all cores or on a cluster, with Ray Tune. Finished trials, each a run folder, are kept."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from delora import tasks
from delora.formats.files import read_json, write_atomically
from delora.recipes import find as find_recipe
from delora.training import experiments, parallel
from delora.training.config import About, Experiment, Strict, assign, load_file, slug, validate
from delora.training.runs import FAILED, RESULT, Result, RunContext, RunError, as_csv, exclusive, write_json

__all__ = ["Case", "Sweep", "Trial", "perform", "read", "rows", "run", "status", "table", "trials"]

SWEEP, RESULTS, TRIALS = "sweep.json", "results.csv", "trials"


class Case(Strict):
    """Keys of the recipe that change together, such as a method and its learning rate. ``scaled``: what the factors multiply.

    >>> Case(name="LoRA", set={"adapter.method": "lora", "train.lr": 3e-3}).scaled
    ['train.lr', 'train.lam_lr']
    """

    name: Annotated[str, Field(min_length=1)]
    set: dict[str, Any] = Field(default={})
    scaled: list[Literal["train.lr", "train.lam_lr"]] = Field(default=["train.lr", "train.lam_lr"], min_length=1)


class Sweep(Strict):
    """All combinations of ``cases``, ``factors`` and the values in ``grid``, each of which changes the recipe.

    ``grid`` and a case's ``set`` have dotted keys of the recipe (``train.lr``, ``adapter.method``, ``seed`` ...). A factor
    multiplies the adapter's learning rates, ``train.lr`` and ``train.lam_lr``, or the one that a case names (Figure 6). The
    head's is multiplied only if it follows ``lr``.

    >>> Sweep(name="mine", out="runs/mine", recipe="quickstart", factors=[0.5, 1.0, 2.0]).grid
    {}
    """

    name: Annotated[str, Field(min_length=1)]
    out: Annotated[str, Field(min_length=1)]
    recipe: str
    about: About = About()
    cases: list[Case] = Field(default=[])
    factors: list[Annotated[float, Field(gt=0)]] = Field(default=[])
    grid: dict[str, list[Any]] = Field(default={})

    @model_validator(mode="after")
    def _something(self) -> Sweep:
        if not (self.cases or self.factors or self.grid):
            raise ValueError("nothing to sweep over: give grid, cases or factors")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key} is an empty list")
        return self


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep, with its case, setting (the same for all seeds), factor and swept values.

    >>> trials(read("robustness"))[0].case
    'DeLoRA'
    """

    experiment: Experiment
    case: str
    setting: str
    factor: float | None
    swept: dict[str, Any]

    @property
    def name(self) -> str:
        return self.experiment.name

    def folder(self, out: Path) -> Path:
        return out / TRIALS / slug(self.name)


def read(sweep: Path | str, changes: Sequence[str] = ()) -> Sweep:
    """The sweep of a TOML or JSON file, or of a shipped sweep's name, with ``key=value`` changes.

    Its ``recipe`` is a file, relative to the sweep's, or a shipped recipe's name.

    Raises:
        ConfigError: a key or value is wrong; the message has its dotted path.

    >>> read("robustness", ["factors=[1.0, 2.0]"]).factors
    [1.0, 2.0]
    """
    file = find_recipe(sweep)
    data = load_file(file)
    if isinstance(data.get("recipe"), str):
        data["recipe"] = str(file.parent / find_recipe(data["recipe"]))  # a shipped one's path is absolute
    for change in changes:
        assign(data, change)
    return validate(data, Sweep, str(file))


def trials(sweep: Sweep) -> list[Trial]:
    """Every trial, with its configuration checked; an error names the trial.

    >>> sweep = read("robustness", ["cases=[]", "grid={seed=[7]}", "factors=[1.0, 2.0]"])
    >>> [trial.name for trial in trials(sweep)]
    ['seed=7, x1', 'seed=7, x2']
    """
    recipe = load_file(Path(sweep.recipe)) | {"variants": [], "out": sweep.out}
    recipe.pop("published", None)  # it belongs to the recipe's own settings
    seeds = recipe.pop("seeds", [])
    keys = {*sweep.grid, *(key for case in sweep.cases for key in case.set)}
    if seeds and "seed" not in keys:  # the recipe's own seeds become part of the grid
        sweep = sweep.model_copy(update={"grid": sweep.grid | {"seed": seeds}})
    plain: list[tuple[str, Case, str, dict[str, Any], dict[str, Any]]] = []
    for case in sweep.cases or [Case(name=sweep.name)]:
        for values in product(*sweep.grid.values()):
            swept = dict(zip(sweep.grid, values, strict=True))
            start = [case.name] if sweep.cases else []
            name = ", ".join([*start, *(f"{key}={value}" for key, value in swept.items())])
            setting = ", ".join([*start, *(f"{key}={value}" for key, value in swept.items() if key != "seed")])
            plain.append((name or sweep.name, case, setting or sweep.name, swept, case.set | swept))
    runs = _runs(recipe, [(name, changes) for name, *_, changes in plain], sweep.recipe)
    if not sweep.factors:
        both = zip(runs, plain, strict=True)
        return [Trial(run, case.name, setting, None, swept) for run, (_, case, setting, swept, _) in both]
    scaled, about = [], []
    for (name, case, setting, swept, changes), run in zip(plain, runs, strict=True):
        base = {"train.lr": run.train.lr, "train.lam_lr": run.train.lam_lr}
        apart = case.scaled == ["train.lam_lr"] or (case.scaled == ["train.lr"] and not run.adapter.fixes_lam())
        if base["train.lam_lr"] is None and apart:
            base["train.lam_lr"] = run.train.lr  # lam would follow the other rate, and with it the factor
        rates = {key: rate for key, rate in base.items() if rate is not None}
        for factor in sweep.factors:
            times = {key: rate * (factor if key in case.scaled else 1) for key, rate in rates.items()}
            scaled.append((f"{name}, x{factor:g}", changes | times))
            about.append((case.name, f"{setting}, x{factor:g}", factor, swept))
    runs = _runs(recipe, scaled, sweep.recipe)
    return [Trial(run.model_copy(update={"factor": what[2]}), *what) for run, what in zip(runs, about, strict=True)]


def _runs(recipe: Mapping[str, Any], changes: Sequence[tuple[str, Mapping[str, Any]]], where: str) -> list[Experiment]:
    """The experiments that the changes make of a recipe. They are read as its variants, and so checked like these."""
    variants = []
    for name, keys in changes:
        variant: dict[str, Any] = {"name": name}
        for key, value in keys.items():
            *outer, last = key.split(".")
            table = variant
            for part in outer:
                table = table.setdefault(part, {})
            table[last] = value
        variants.append(variant)
    return [run for _, run in tasks.parse({**recipe, "variants": variants}, where=where).runs()]


# ---------------------------------------------------------------- running


def run(
    sweep: Sweep,
    console: Console,
    address: str | None = None,
    cpus: int = 1,
    concurrent: int | None = None,
    processes: int = 1,
) -> list[str]:
    """Run the trials that are not finished. Returns the names of those that failed; the reasons are in their folders.

    Args:
        address: that of a Ray cluster, whose machines must all see the folder ``out``; None: this machine alone.
        cpus: cores for each process of a trial.
        concurrent: how many trials may run at the same time; None: as many as the cores allow.
        processes: how many run each trial together, as the recipe's ``parallel`` says; each has a GPU if there are any.

    Raises:
        ConfigError: a trial is impossible; all are checked before the first starts.
        RunError: another process is running this sweep, or the cluster cannot be reached.
    """
    out = Path(sweep.out).absolute()
    with exclusive(out):
        if address is not None:
            _reach(address)
        every = trials(sweep)
        for trial in every:
            task = tasks.find(trial.experiment.task)
            parallel.require(trial.experiment, task.PARALLEL, processes)
            experiments.check(task, trial.experiment)  # which also fetches the model and the data, once for all trials
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SWEEP, sweep.model_dump(mode="json"))
        missing = [trial for trial in every if not (trial.folder(out) / RESULT).is_file()]
        for trial in missing:
            (trial.folder(out) / FAILED).unlink(missing_ok=True)
        with Live(console=console, auto_refresh=False, transient=True) as live:
            if missing:
                _on_ray(missing, out, console, live, every, address, cpus, concurrent, processes)
        write_atomically(out / RESULTS, as_csv(list(rows(every, out))).encode())
        console.print(table(every, out))
        failed = [trial for trial in every if not (trial.folder(out) / RESULT).is_file()]
        for trial in failed:
            console.print(f"{trial.name} failed: {reason(trial, out)}", markup=False)
        return [trial.name for trial in failed]


def _reach(address: str) -> None:
    """Raise a RunError if nothing answers at this address: Ray itself would end the process without a message."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise RunError(
                f"nothing answers at {address}, the Ray cluster's address: {error}; is it running there (ray status)?"
            ) from error


def _on_ray(
    missing: Sequence[Trial],
    out: Path,
    console: Console,
    live: Live,
    every: Sequence[Trial],
    address: str | None,
    cpus: int,
    concurrent: int | None,
    processes: int,
) -> None:
    # Ray sends no usage report, does not warn about GPUs, and prints nothing.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    import ray
    from ray import tune

    def show(done: Trial) -> None:
        if console.is_terminal:
            live.update(table(every, out), refresh=True)
        else:
            console.print(f"{done.name}: {status(done, out)}", markup=False, highlight=False)

    class Shown(tune.Callback):
        def __init__(self, show: Callable[[Trial], None]) -> None:
            self.show = show

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Ray pickles its callbacks, and a console cannot be pickled

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self.show(missing[trial.config["number"]])

        on_trial_error = on_trial_complete

    here = Path.cwd()
    one = {"CPU": float(cpus)} | ({"GPU": 1.0} if processes > 1 and torch.cuda.is_available() else {})
    # The trial itself only waits for its processes.
    several = tune.PlacementGroupFactory([{}, *[one] * processes], strategy="PACK")

    def work(config: dict[str, Any]) -> None:
        trial = missing[config["number"]]
        if processes == 1:
            prepare(here, cpus)
            perform(trial, out)
        else:
            perform_together(trial, out, here, processes, cpus, one)

    # All machines of a cluster must see Ray's own files, as they see ``out``.
    with tempfile.TemporaryDirectory(prefix=".ray-" if address else "ray-", dir=out if address else None) as logs:
        cores = max(os.cpu_count() or 1, cpus * processes)
        local: dict[str, Any] = {"num_cpus": cores, "_temp_dir": logs, "include_dashboard": False}
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        ray.init(address=address or "local", **quiet, **({} if address else local))
        try:
            tune.Tuner(
                tune.with_resources(work, {"cpu": cpus} if processes == 1 else several),
                param_space={"number": tune.grid_search(list(range(len(missing))))},
                tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
                run_config=tune.RunConfig(storage_path=logs, verbose=0, callbacks=[Shown(show)]),
            ).fit()
        finally:
            ray.shutdown()


def prepare(here: Path, cpus: int) -> None:
    """Ray starts processes in another folder, with all cores; a recipe's paths are relative to ``here``."""
    if here.is_dir():
        os.chdir(here)
    torch.set_num_threads(cpus)


def perform(trial: Trial, out: Path) -> None:
    """Run one trial, as ``delora train`` would. An error is written into its folder, and the other trials continue."""
    with written(trial.folder(out)):
        _perform(trial, out)


def _perform(trial: Trial, out: Path) -> None:
    task = tasks.find(trial.experiment.task)
    parallel.join(trial.experiment, task.PARALLEL)
    context = RunContext(trial.folder(out), out, trial.case, trial.setting, Console(quiet=True))
    with parallel.together():
        task.run(trial.experiment, context, task.check(trial.experiment))


class Process:
    """One of the processes that run a trial together, on the machine that Ray chose for it."""

    def address(self) -> tuple[str, int]:
        """Of a free port here, where the processes meet."""
        import ray

        with socket.socket() as s:
            s.bind(("", 0))
            return ray.util.get_node_ip_address(), s.getsockname()[1]

    def run(self, rank: int, n: int, address: tuple[str, int], trial: Trial, out: Path, here: Path, cpus: int) -> None:
        """The work of one process of ``n``, as torchrun would start it."""
        host, port = address
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # it sees one GPU, its own
        prepare(here, cpus)
        _perform(trial, out)


def perform_together(trial: Trial, out: Path, here: Path, n: int, cpus: int, resources: Mapping[str, float]) -> None:
    """Run one trial by ``n`` processes, each with a share of the trial's placement group. If one fails, all are ended."""
    import ray
    from ray.util.placement_group import get_current_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group: Any = get_current_placement_group()

    def start(bundle: int) -> Any:
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        options = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0), "scheduling_strategy": place}
        return ray.remote(Process).options(**options).remote()

    with written(trial.folder(out)):
        together = [start(bundle) for bundle in range(n)]
        try:
            address = ray.get(together[0].address.remote())
            waiting = [each.run.remote(rank, n, address, trial, out, here, cpus) for rank, each in enumerate(together)]
            while waiting:
                ended, waiting = ray.wait(waiting)
                ray.get(ended)
        finally:
            for each in together:
                ray.kill(each)


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """A context whose error is written into a trial's folder.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written(Path(folder, "a")):
    ...         raise ValueError("no data")
    ...     read_json(Path(folder, "a", FAILED))
    {'error': 'ValueError: no data'}
    """
    try:
        yield
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # what a process raised, in Ray's error
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FAILED, {"error": f"{type(cause).__name__}: {cause}"})


# ---------------------------------------------------------------- what came of it


def reason(trial: Trial, out: Path) -> str:
    """Why a trial failed."""
    file = trial.folder(out) / FAILED
    return read_json(file)["error"] if file.is_file() else "its process ended without an error message (out of memory?)"


def status(trial: Trial, out: Path) -> str:
    """How far a trial is, in words.

    >>> status(trials(read("robustness"))[0], Path("no/such/folder"))
    'to do'
    """
    result = Result.read(trial.folder(out))
    if result is None:
        return "failed" if (trial.folder(out) / FAILED).is_file() else "to do"
    if result.diverged is not None or result.test is None:
        return f"diverged at step {result.diverged}"
    return f"test {result.reported} {100 * result.test:.1f} %"


def table(every: Sequence[Trial], out: Path) -> Table:
    """A table of the trials and their status.

    >>> table(trials(read("robustness")), Path("no/such/folder")).row_count
    24
    """
    lines = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("Trial", "Outcome"):
        lines.add_column(name, overflow="fold")
    for trial in every:
        lines.add_row(Text(trial.name), Text(status(trial, out)))
    return lines


def rows(every: Sequence[Trial], out: Path) -> Iterator[dict[str, Any]]:
    """One row for each trial: its case and values, its learning rates, and all values of its result.

    >>> next(rows(trials(read("robustness")), Path("no/such/folder")))["trial"]
    'DeLoRA, seed=0, data.train=1000, x0.25'
    """
    for trial in every:
        result = Result.read(trial.folder(out))
        figures = {} if result is None else dataclasses.asdict(result)
        train = trial.experiment.train
        yield {
            "trial": trial.name,
            "case": trial.case,
            "factor": trial.factor,
            "seed": trial.experiment.seed,
            "lr": train.lr,
            **trial.swept,
            "status": status(trial, out),
            **{key: value for key, value in figures.items() if key not in ("name", "row", "setting", "folder", "scores")},
            **{f"test {key}": value for key, value in figures.get("scores", {}).items()},
        }
