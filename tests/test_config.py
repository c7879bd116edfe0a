"""Experiments: what a recipe says is what runs, and what it says wrongly is an error that says where."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from delora import DeLoRA, Full, LoRA
from delora.tasks import parse, read
from delora.training import config
from delora.training.config import ConfigError, differences

ROOT = Path(__file__).parents[1]
BASE = {
    "task": "sentiment",
    "name": "base",
    "out": "runs/base",
    "model": "somewhere",
    "adapter": {"method": "delora", "r": 4, "lam": 12, "start": "paired", "targets": ["query"]},
    "train": {"lr": 1e-3},
    "variants": [
        {"name": "as it is"},
        {"name": "lora", "adapter": {"method": "lora", "alpha": 8.0}, "train": {"epochs": 5}},
        {"name": "head", "adapter": {"method": "full", "targets": ["classifier"]}, "seed": 3},
    ],
}


def base(*overrides: str):
    return parse(copy.deepcopy(BASE), overrides)


def test_every_recipe_of_the_repository_loads():
    for recipe in (ROOT / "paper").rglob("recipes/**/*.toml"):
        for _, run in read(recipe).runs():
            run.adapter.build()


def test_the_quickstart_compares_what_it_says():
    runs = {variant.name: run for variant, run in read("quickstart").runs()}
    assert runs["LoRA 3e-2"].adapter.build() == LoRA(r=8, alpha=16.0)
    assert runs["DeLoRA 3e-2"].adapter.build() == DeLoRA(r=8, reach=0.1, start="subtract")
    rates = {name: run.train.lr for name, run in runs.items() if "LoRA" in name}
    assert rates == {"LoRA 3e-3": 3e-3, "LoRA 3e-2": 3e-2, "DeLoRA 3e-2": 3e-2, "DeLoRA 3e-1": 3e-1}
    assert not any(run.adapter.build().learn_lam for name, run in runs.items() if name.startswith("DeLoRA"))
    heads = [run for run in runs.values() if run.adapter.build() == Full()]
    assert len({run.train.head_lr for run in heads}) == len(heads) > 1
    assert len({run.data for run in runs.values()}) == len({run.seed for run in runs.values()}) == 1


def test_variants_change_what_they_name_and_nothing_else():
    (_, same), (_, lora), (_, head) = base().runs()
    assert same.adapter.build() == DeLoRA(r=4, lam=12, start="paired")
    assert lora.adapter.build() == LoRA(r=4, alpha=8.0)  # r is both methods', lam and start are DeLoRA's alone
    assert (lora.train.epochs, lora.train.lr, lora.adapter.targets) == (5, 1e-3, ["query"])
    assert (head.adapter.build(), head.adapter.targets, head.seed) == (Full(), ["classifier"], 3)


def test_a_rate_for_a_lam_that_is_not_learned_is_refused_before_anything_runs():
    for change in ("train.lam_lr=0.01", "train.lam_weight_decay=0.01"):
        key = change.partition("=")[0]
        with pytest.raises(
            ConfigError, match=rf"{key} = 0.01: lam is not learned; leave it out, or set adapter.learn_lam = true"
        ):
            base(change)
        assert base(change, "adapter.learn_lam=true").runs()
        assert base(change, "adapter.overrides={query={learn_lam=true}}").runs()
    assert base("train.lam_lr=0.0").runs()


def test_reach_takes_the_place_of_lam_and_lam_that_of_reach():
    assert base("adapter.reach=0.1").runs()[0][1].adapter.build() == DeLoRA(r=4, reach=0.1, start="paired")
    recipe = copy.deepcopy(BASE)
    recipe["variants"] = [{"name": "reach", "adapter": {"reach": 0.2}}, {"name": "lam", "adapter": {"lam": 3.0}}]
    (_, reach), (_, lam) = parse(recipe).runs()
    assert (reach.adapter.build().lam, reach.adapter.build().reach) == (None, 0.2)
    assert (lam.adapter.build().lam, lam.adapter.build().reach) == (3.0, None)
    both = BASE | {"adapter": BASE["adapter"] | {"reach": 0.1}}
    with pytest.raises(ConfigError, match="lam = 12 and reach = 0.1: both say how strong the change is"):
        parse(copy.deepcopy(both))


def test_an_experiment_survives_being_written():
    experiment = base()
    assert parse(experiment.model_dump(mode="json")) == experiment


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=7", "epochs", 7),
        ("train.head_lr=3e-2", "head_lr", 3e-2),
        ('train.precision="bf16"', "precision", "bf16"),
        ("train.precision=bf16", "precision", "bf16"),
    ],
)
def test_overrides_are_toml_values_or_else_strings(override, key, value):
    assert getattr(base(override, "variants=[]").train, key) == value


def test_overrides_reach_plain_keys_lists_and_the_method():
    changed = base("model=a/b", 'adapter.targets=["key", "value"]', "adapter.lam=2.5", "variants=[]")
    assert (changed.model, changed.adapter.targets, changed.adapter.build().lam) == ("a/b", ["key", "value"], 2.5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epohcs=2", r"train\.epohcs: unknown key; did you mean epochs\?"),
        ("lr=2.0", r"lr: unknown key; did you mean train\.lr\?"),
        ("learning_rate=2.0", r"learning_rate: unknown key; did you mean train\.lr\?"),  # as transformers calls it
        ("train.max_steps=2", r"train\.max_steps: unknown key; did you mean train\.steps\?"),
        ("rank=4", r"rank: unknown key; did you mean adapter\.r\?"),
        ("adapter.lora_r=4", r"adapter\.lora_r: unknown key; did you mean r\?"),  # as PEFT does
        ("reach=0.1", r"reach: unknown key; did you mean adapter\.reach\?"),
        ("adapter.lamb=2.0", r"adapter\.lamb: unknown key; did you mean lam\?"),
        ("adapter.taregts=[]", r"adapter\.taregts: unknown key; did you mean targets\?"),
        ("adapter.alpha=2.0", r"adapter\.alpha: unknown key"),
        ("adapter.method=delroa", r"adapter\.method = 'delroa': did you mean delora\?"),
        ("adapter.r=0", r"adapter\.r = 0: the rank must be an integer"),
        ("adapter.lam=true", r"adapter\.lam = True: must be a finite number above 0"),
        ("adapter.start=sideways", r"adapter\.start = 'sideways': must be one of 'subtract'"),
        ("adapter.targets=3", r"adapter\.targets: must be a regular expression or a list of names, got 3"),
        ("adapter.dropout=1.0", r"adapter\.dropout = 1\.0: input should be less than 1"),
        ("train.epochs=1.5", r"train\.epochs = 1\.5: .*integer"),
        ("train.epochs=true", r"train\.epochs = True: .*integer"),
        ("train.lr=nan", r"train\.lr = nan: .*finite"),
        ("train.lr='1e-3'", r"train\.lr = '1e-3': .*number"),
        ("data.domain=film", r"data\.domain = 'film': .*'movie', 'product'"),
        ("data=3", r"data = 3: must be a table"),
        ("variants=[{name='x', trian={}}]", r"variants\.0\.trian: unknown key; did you mean train\?"),
        ("variants=[{name='x', train={epohcs=1}}]", r"variants\[0\] \(x\): train\.epohcs: unknown key; did you mean epochs\?"),
        ("variants=[{name='x', adapter={lam=-1}}]", r"variants\[0\] \(x\): adapter\.lam = -1"),
        ("variants=[{name='x'}, {name='X'}]", r"variants: 'x' and 'X' would have the same folder"),
        ("train.epochs", r"'train\.epochs': a change is written key=value"),
        ("model.size=3", r"model is a value, not a table"),
        ("train.epochs=3", r"train\.epochs: these variants set it themselves: lora; .*variants=\[\]"),
    ],
)
def test_an_error_says_where_and_what_to_do(override, words):
    with pytest.raises(ConfigError, match=words):
        base(override)


def test_a_missing_key_is_named():
    data = copy.deepcopy(BASE)
    del data["model"]
    with pytest.raises(ConfigError, match="model: is missing"):
        parse(data)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*: No such file"):
        read(tmp_path / "none.toml")
    for name, kind in (("broken.toml", "TOML"), ("broken.json", "JSON")):
        (tmp_path / name).write_text("= [")
        with pytest.raises(ConfigError, match=f"{name} is not valid {kind}"):
            read(tmp_path / name)


def test_differences_name_the_dotted_keys():
    a, b = base("variants=[]").model_dump(), base("train.lr=0.5", "adapter.lam=3", "variants=[]").model_dump()
    assert sorted(differences(a, b)) == [("adapter.lam", 12, 3), ("train.lr", 1e-3, 0.5)]
    assert not list(differences(a, copy.deepcopy(a)))


def test_every_key_that_other_libraries_call_otherwise_is_one_of_a_recipe():
    """And no name of theirs is a key of a recipe, which the hint would then hide."""
    for key, names in config.ELSEWHERE.items():
        last = key.rpartition(".")[2]
        assert key.startswith("data.") or key in config.keys_named(last), key
        for name in names:
            assert config.keys_named(name) == [key], name
