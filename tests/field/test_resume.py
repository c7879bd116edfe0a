"""1p. Resume: from a checkpoint of which every file is as it was written, with the settings it was written with; or said."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import TrainingArguments

import delora
from delora import DeLoRA, LoRA
from delora.formats.files import AdapterError
from delora.integrations import AdapterTrainer
from delora.integrations.checkpoints import damage, last_checkpoint
from delora.tasks import classification, parse
from delora.training import experiments, runs
from delora.training.config import ConfigError
from delora.training.runs import RunError, claim, discard, exclusive
from tests import tiny
from tests.cases import Net
from tests.field.campaign import in_a_process
from tests.test_training import experiment, lines, numbers, stop_early

QUIET = Console(quiet=True)
FILES = ("adapter.json", "adapter-*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny.make_model(folder / "model"), tiny.make_sentences(folder / "data")


@pytest.fixture(scope="module")
def done(sources, tmp_path_factory) -> Path:
    """A finished run with two checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "done"
    experiments.train(classification, parse(tiny.recipe(*sources, out)), QUIET)
    return out


def missing(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("harm", [missing, truncated, one_bit])
def test_a_checkpoint_with_any_file_damaged_is_passed_over_and_said(done, tmp_path, name, harm):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(done / "variants" / "tiny" / "checkpoints", checkpoints)
    (file,) = (checkpoints / "checkpoint-12").glob(name)
    harm(file)
    told: list[str] = []
    assert last_checkpoint(checkpoints, told.append) == str(checkpoints / "checkpoint-6")
    (line,) = told
    assert line.startswith(f"{checkpoints / 'checkpoint-12'} is not whole: ")
    assert line.endswith("; going on from checkpoint-6")
    assert file.name in line or name == "manifest.json"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter-*.safetensors"])
def test_a_run_goes_on_from_the_older_whole_checkpoint_to_the_same_numbers(sources, done, tmp_path, name):
    out = tmp_path / "r"
    shutil.copytree(done, out)
    stop_early(out, "tiny")
    (file,) = (out / "variants" / "tiny" / "checkpoints" / "checkpoint-12").glob(name)
    missing(file)
    console = Console(width=500, file=io.StringIO())
    recipe = parse(json.loads((out / "config.json").read_text()), [f"out={out}"])
    experiments.train(classification, recipe, console)
    assert f"'{file.name}' is missing; going on from checkpoint-6" in console.file.getvalue()
    assert numbers(out) == numbers(done)
    assert lines(out / "variants" / "tiny") == lines(done / "variants" / "tiny")


def test_without_a_whole_checkpoint_a_run_starts_anew_and_says_so(done, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(done / "variants" / "tiny" / "checkpoints", checkpoints)
    for file in checkpoints.glob("*/optimizer.pt"):
        one_bit(file)
    told: list[str] = []
    assert last_checkpoint(checkpoints, told.append) is None
    assert all(line.endswith("; no older one is whole, starting anew") for line in told)
    assert len(told) == 2


def test_a_checkpoint_whose_best_one_is_damaged_cannot_be_ended(done, tmp_path):
    """The best state is loaded at the end: it must be there."""
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(done / "variants" / "tiny" / "checkpoints", checkpoints)
    state = json.loads((checkpoints / "checkpoint-12" / "trainer_state.json").read_text())
    if state["best_global_step"] != 6:
        pytest.skip("the last epoch was the best")
    one_bit(checkpoints / "checkpoint-6" / "optimizer.pt")
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-12")
    told: list[str] = []
    assert last_checkpoint(checkpoints, told.append, best=True) is None
    assert "its best checkpoint was checkpoint-6, which is not whole" in told[0]


def test_other_folders_beside_checkpoints_are_none(tmp_path):
    for name in ("checkpoint-old", "checkpoint-", "checkpoint-1a", "checkpoint--3"):
        (tmp_path / name).mkdir()
    told: list[str] = []
    assert last_checkpoint(tmp_path, told.append) is None
    assert not told


def test_a_manifest_that_leads_elsewhere_is_none(done, tmp_path):
    checkpoint = tmp_path / "checkpoint-12"
    shutil.copytree(done / "variants" / "tiny" / "checkpoints" / "checkpoint-12", checkpoint)
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert damage(checkpoint) == "'../secret' is missing"


# ---------------------------------------------------------------- a Trainer of one's own


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        return {"ids": torch.randint(0, 20, (6,), generator=g), "labels": torch.tensor(i % 3)}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()

    def forward(self, ids, labels):
        logits = self.net(ids)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(folder: Path, method=None, dropout: float = 0.0, rates=None, **changes) -> AdapterTrainer:
    model = delora.inject(Classifier(), method or LoRA(r=2), ["q", "v"], dropout=dropout)
    values = {"learning_rate": 1e-2, "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    values |= {"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "save_strategy": "steps"}
    arguments = TrainingArguments(output_dir=str(folder), **(values | changes))
    return AdapterTrainer(model, arguments, train_dataset=Sentences(), **(rates or {}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    trainer(folder).train()
    return folder


def state(made: AdapterTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in made.model.parameters() if p.requires_grad]


def test_the_newest_whole_checkpoint_is_taken_when_the_trainer_is_to_find_it(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "r")
    missing(tmp_path / "r" / "checkpoint-6" / "scheduler.pt")
    expected = trainer(trained)
    expected.train(resume_from_checkpoint=str(trained / "checkpoint-4"))
    again = trainer(tmp_path / "r")
    with pytest.warns(UserWarning, match=r"checkpoint-6 is not whole: 'scheduler.pt' is missing; going on from checkpoint-4"):
        again.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(state(again), state(expected), strict=True))
    with pytest.raises(AdapterError, match="holds no whole checkpoint: train without resume_from_checkpoint"):
        trainer(tmp_path / "none").train(resume_from_checkpoint=True)


OTHER = {
    "a rate": ({"learning_rate": 2e-2}, r"learning_rate = 0\.01 there, 0\.02 now"),
    "a method": ({"method": LoRA(r=3)}, r"method = \['LoRA\(r=2.* there, \['LoRA\(r=3.* now"),
    "another class": ({"method": DeLoRA(r=2)}, r"method = .*LoRA\(r=2.* there, \[.DeLoRA\(r=2"),
    "a dropout": ({"dropout": 0.5}, r"dropout = \[0\.0\] there, \[0\.5\] now"),
    "a rate of lam": ({"rates": {"lam_lr": 1.0}}, r"lam_lr = None there, 1\.0 now"),
    "a decay": ({"weight_decay": 0.1}, r"weight_decay = 0\.0 there, 0\.1 now"),
    "a schedule": ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type = 'linear' there, 'cosine' now"),
    "a batch": ({"per_device_train_batch_size": 2}, r"per_device_train_batch_size = 4 there, 2 now"),
    "a seed": ({"seed": 1}, r"seed = 42 there, 1 now"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_checkpoint_of_other_settings_is_refused(trained, tmp_path, case):
    changes, words = OTHER[case]
    made = trainer(tmp_path, **changes)
    before = state(made)
    with pytest.raises(AdapterError, match=rf"checkpoint-4 was written with other settings: {words}"):
        made.train(resume_from_checkpoint=str(trained / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(state(made), before, strict=True))


def test_more_steps_are_no_other_settings(trained, tmp_path):
    made = trainer(tmp_path, max_steps=8)
    made.train(resume_from_checkpoint=str(trained / "checkpoint-4"))
    assert made.state.global_step == 8


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_that_is_named_is_refused(trained, tmp_path, name):
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    (file,) = (tmp_path / "checkpoint-4").glob(name)
    one_bit(file)
    with pytest.raises(AdapterError, match=r"checkpoint-4 is not whole: "):
        trainer(tmp_path / "r").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_without_the_optimizers_state_is_refused(tmp_path):
    trainer(tmp_path, save_only_model=True).train()
    with pytest.raises(AdapterError, match=r"holds no optimizer\.pt \(save_only_model\?\): training cannot go on from it"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# ---------------------------------------------------------------- the folder of a run


def test_a_claim_in_which_the_process_was_killed_is_taken_up(tmp_path):
    """Killed between making the folder and its configuration, at any act on the disk."""
    for at, left in enumerate(([], [".config.json.0123456789abcdef.tmp"], [".config.json.4321.tmp"])):
        out = tmp_path / str(at)
        out.mkdir()
        for name in left:
            (out / name).write_text('{"task": "sent')
        claim(out, experiment(out))
        assert [p.name for p in out.iterdir()] == ["config.json"]
        claim(out, experiment(out))


def test_a_really_killed_claim_is_taken_up(tmp_path):
    def claims() -> None:
        number = 0
        while True:
            claim(tmp_path / str(number), experiment(tmp_path / str(number)))
            number += 1

    for _ in range(10):
        process = in_a_process(claims)
        time.sleep(0.03)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        for out in list(tmp_path.iterdir()):
            claim(out, experiment(out))
            assert [p.name for p in out.iterdir()] == ["config.json"]
            shutil.rmtree(out)


def test_what_a_killed_deletion_left_goes_with_the_next_run(tmp_path):
    out = tmp_path / "r"
    claim(out, experiment(out))
    out.rename(tmp_path / ".r.deleted")
    claim(out, experiment(out))
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_run_behind_a_symbolic_link_is_deleted_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    there, out = tmp_path / "disk" / "run", tmp_path / "r"
    claim(there, experiment(out))
    (there / "old").touch()
    out.symlink_to(there)
    discard(out)
    assert out.is_symlink()
    assert not list(there.iterdir())
    claim(out, experiment(out, "train.lr=0.5"))
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["run"]
    with exclusive(out), pytest.raises(RunError, match="another process is running"), exclusive(there):
        pass


@pytest.mark.parametrize("change", [["train.save_steps=4"], ["adapter.lam=1e39"], ['adapter.overrides={"("={r=2}}']])
def test_a_recipe_that_cannot_run_leaves_its_folder_free(sources, tmp_path, change):
    out = tmp_path / "r"
    with pytest.raises(ConfigError):
        experiments.train(classification, parse(tiny.recipe(*sources, out), change), QUIET)
    assert not out.exists()
    claim(out, experiment(out))


def test_the_folder_of_finished_runs_is_never_deleted_for_a_later_mistake(sources, tmp_path):
    out = tmp_path / "r"
    recipe = tiny.recipe(*sources, out, train__epochs=1)
    variants = [{"name": "a"}, {"name": "b", "train": {"save_steps": 2}}]
    with pytest.raises(ConfigError, match="b: train.save_steps = 2"):
        experiments.train(classification, parse(recipe | {"variants": variants}), QUIET)
    assert (out / "variants" / "a" / runs.RESULT).is_file()
