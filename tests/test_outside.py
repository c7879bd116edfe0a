"""Methods and tasks of a user's own, from files in the working folder: trained, saved, loaded, merged, exported, reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import delora
from delora import outside, tasks
from delora.training.config import ConfigError
from tests import tiny
from tests.test_cli import delora_, run

METHOD = """
from dataclasses import dataclass
import torch
from torch import nn
from delora.updates import LowRank

@dataclass(frozen=True)
class Outer:
    \'\'\'W\' = W + scale b a\'\'\'
    scale: float = 1.0

    def init(self, W):
        return {"a": nn.Parameter(torch.randn(W.shape[1])), "b": nn.Parameter(torch.zeros(W.shape[0]))}

    def update(self, W, p):
        return LowRank(up=self.scale * p["b"][:, None], down=p["a"][None, :])

class Plain:
    pass
""".replace("\\'", "'")

TASK = """
import torch
from delora.training.config import Experiment, Strict
from delora.training.experiments import adapt, begin, conclude, fit

class Data(Strict):
    rows: int = 32

class Settings(Experiment):
    data: Data = Data()

class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def forward(self, x, labels=None):
        y = self.head(torch.tanh(self.q(x))).squeeze(-1)
        return {"logits": y} if labels is None else {"loss": (y - labels).square().mean(), "logits": y}

def base(experiment):
    torch.manual_seed(0)
    return Regression()

def check(experiment):
    adapt(base(experiment), experiment)
    x = torch.randn(experiment.data.rows, 4, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": row.sum()} for row in x]

def run(experiment, context, data):
    begin(experiment, context)
    model = base(experiment)
    adapt(model, experiment)
    trainer = fit(experiment, context, model, metric=None, train_dataset=data)
    def score():
        model.eval()
        x, y = (torch.stack([row[key] for row in data]) for key in ("x", "labels"))
        r2 = 1 - ((model(x)["logits"] - y).var() / y.var()).item()
        return {"validation": r2, "test": r2, "scores": {"r2": r2}}
    return conclude(experiment, context, model, trainer, "r2", "r2", score)
"""


def write(tmp_path: Path) -> None:
    """A user's two files, and a recipe that names them."""
    (tmp_path / "mymethods.py").write_text(METHOD)
    (tmp_path / "mytasks").mkdir()
    (tmp_path / "mytasks" / "tickets.py").write_text(TASK)
    (tmp_path / "my.toml").write_text(
        'task = "mytasks.tickets"\nname = "mine"\nout = "out"\nmodel = "none"\n'
        '[adapter]\nmethod = "mymethods:Outer"\nscale = 0.5\ntargets = ["q"]\nalso_train = ["head"]\n'
        "[train]\nepochs = 2\nbatch_size = 8\nlr = 1e-2\n"
    )


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a user's own files."""
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    tasks.find.cache_clear()
    yield tmp_path
    tasks.find.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("mymethods", "mytasks"))]:
        del sys.modules[name]
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


@pytest.mark.slow
def test_a_recipe_with_a_method_and_a_task_of_ones_own(folder):
    done = delora_("train", "my.toml")  # in a process of its own, whose path begins with no folder of ours
    assert done.returncode == 0, done.stderr
    assert "Test r2 [%]" in done.stdout
    adapter = json.loads((folder / "out" / "adapter" / "adapter.json").read_text())
    assert (adapter["method"], adapter["fields"]) == ("outer", {"scale": 0.5})
    assert run("train", "my.toml")[0] == 0  # nothing is left to do
    # A page of many runs imports nothing because a file says so.
    tasks.find.cache_clear()
    code, _, message = run("report", "out", "--out", "page")
    assert code == 1
    assert "names 'mytasks.tickets', and nothing is imported because a file says so" in " ".join(message.split())
    code, _, message = run("report", "out", "--out", "page", "--module", "mytasks.tickets", "--module", "mymethods")
    assert code == 0, message
    assert (folder / "page" / "runs.csv").is_file()


@pytest.mark.slow
def test_a_method_of_ones_own_on_an_ordinary_task(folder):
    data = tiny.recipe(tiny.make_model(folder / "model"), tiny.make_sentences(folder / "data"), folder / "run")
    data["adapter"] = {"method": "mymethods:Outer", "targets": ["query"], "also_train": ["classifier"]}
    data["train"]["epochs"] = 1
    tiny.write(data, folder / "recipe.json")
    options = ("--model", folder / "model", "--out")
    for command in (
        ("train", "recipe.json"),
        *((name, "run/adapter", *options, name, "--method", "mymethods:Outer") for name in ("merge", "export")),
        ("inspect", "run/adapter"),
        ("evaluate", "run/adapter", "--recipe", "recipe.json"),
    ):
        code, _, message = run(*command)
        assert code == 0, message
    code, _, message = run("merge", "run/adapter", *options, "merged")
    assert code == 1
    assert "--method" in message  # the way out on the command line, not only in Python
    # On a grid as well, whose trials run in processes of their own.
    (folder / "grid.toml").write_text('name = "grid"\nout = "grid"\nrecipe = "recipe.json"\n[grid]\n"adapter.scale" = [0.5]\n')
    swept = delora_("sweep", "grid.toml")
    assert swept.returncode == 0, swept.stdout + swept.stderr


def test_an_adapter_whose_method_the_model_has_needs_no_word(folder):
    """As a checkpoint of the Trainer's is read."""
    outer = outside.method("mymethods:Outer")
    model = delora.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), outer(), ["0"])
    delora.save(model, folder / "adapter")
    delora.load(model, folder / "adapter")
    with pytest.raises(delora.AdapterError, match="unknown method 'outer'"):
        delora.load(torch.nn.Sequential(torch.nn.Linear(4, 4)), folder / "adapter")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nomodule:Outer", "there is no module 'nomodule', neither in .* nor among the installed packages$"),
        ("mymethds:Outer", r"nor among the installed packages \(did you mean mymethods.py\?\)"),
        ("mymethods:Xyz", "mymethods has no class 'Xyz'; known are Outer, Plain"),
        ("mymethods:Uoter", "mymethods has no class 'Uoter'; did you mean Outer"),
        ("mymethods:Plain", "mymethods:Plain is no method: a method is a dataclass with .* and it has no init and no update"),
        ("mymethods:", "a method of your own is written module:Class"),
        ("broken:Outer", "broken cannot be imported: ZeroDivisionError: division by zero"),
        ("lacking:Outer", "lacking imports 'nowhere_to_be_found', which is not installed"),
    ],
)
def test_what_cannot_be_imported_is_told(folder, name, words):
    (folder / "broken.py").write_text("1 / 0")
    (folder / "lacking.py").write_text("import nowhere_to_be_found")
    with pytest.raises(outside.OutsideError, match=words):
        outside.method(name)
    with pytest.raises(ConfigError, match=f"adapter.method = .*{words}"):
        tasks.read("my.toml", [f"adapter.method={name}"])


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("sentimnt", "task = 'sentimnt': did you mean sentiment"),
        ("mytasks.ticket", "there is no module 'mytasks.ticket'"),
        ("mymethods", "mymethods is no task: it has no Settings .*, no check, no base, no run"),
    ],
)
def test_what_is_no_task_is_told(folder, task, words):
    with pytest.raises((ConfigError, outside.OutsideError), match=words):
        tasks.read("my.toml", [f"task={task}"])
