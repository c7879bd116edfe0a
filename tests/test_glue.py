"""GLUE: the split index by index, the eight tasks from a folder, every recipe on the real shapes, the metrics."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

import delora
from delora.data import glue
from delora.data.examples import DataError, Example, TextTask
from delora.data.sentences import TASKS as RATED
from delora.evaluation import text
from delora.reports.experiment import write
from delora.tasks import classification, find, parse, read
from delora.training import experiments
from delora.training.config import ConfigError
from delora.training.experiments import Outcome
from delora.training.models import skeleton
from tests import tiny

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "paper" / "recipes" / "glue").glob("*.toml"))
# Of the data set, and of what the authors' code makes of them: validation set, new validation part, new test part.
SIZES = {
    "mnli": (9815, 1000, 8815),
    "sst2": (872, 436, 436),
    "mrpc": (408, 204, 204),
    "cola": (1043, 522, 521),
    "qnli": (5463, 1000, 4463),
    "qqp": (40430, 1000, 39430),
    "rte": (277, 138, 139),
    "stsb": (1500, 750, 750),
}


# ---------------------------------------------------------------- the split


@pytest.mark.parametrize("task", SIZES)
@pytest.mark.parametrize("seed", [42, 43, 44, 45, 46])
def test_the_split_index_by_index(task, seed):
    """Against the authors' lines: ``permutation[:n]`` and ``permutation[n:]``, for CoLA the other way round."""
    whole, validation, test = SIZES[task]
    found = glue.divide(task, whole, seed)
    assert (len(found[0]), len(found[1])) == (validation, test)
    order = np.random.RandomState(seed).permutation(whole)
    cut = 521 if task == "cola" else validation
    parts = (order[:cut].tolist(), order[cut:].tolist())
    assert found == (parts[::-1] if task == "cola" else parts)
    assert sorted(found[0] + found[1]) == list(range(whole))


def test_too_few_examples_to_divide():
    with pytest.raises(DataError, match="qnli: 1,000 validation examples cannot be divided"):
        glue.divide("qnli", 1000, 0)


# ---------------------------------------------------------------- reading


def made(task: str, n: int) -> dict[str, list[Any]]:
    """Examples whose label can be told from their words, with GLUE's columns and label types."""
    draw, known = random.Random(n), glue.TASKS[task]
    rows: dict[str, list[Any]] = {column: [] for column in (*known.columns, "label", "idx")}
    for i in range(n):
        label = draw.uniform(0, 5) if known.regression else draw.randrange(len(known.labels))
        words = tiny.GOOD if label >= (2.5 if known.regression else 1) else tiny.BAD
        for column in known.columns:
            rows[column].append(" ".join(draw.choices(words, k=3) + draw.choices(tiny.OTHER, k=3)))
        rows["label"].append(label)
        rows["idx"].append(i)
    return rows


def save(task: str, folder: Path, validation: int = 40, train: int = 32, **changes: Any) -> str:
    """As `datasets` saves what it has from the Hub."""
    known = glue.TASKS[task]
    parts = {"train": made(task, train), known.validation: made(task, validation) | changes}
    kind = {} if known.regression else {"label": datasets.ClassLabel(names=list(known.labels))}
    saved = datasets.DatasetDict()
    for name, rows in parts.items():
        part = datasets.Dataset.from_dict(rows)
        for column, feature in kind.items():
            part = part.cast_column(column, feature) if all(isinstance(v, int) for v in rows.get(column, "x")) else part
        saved[name] = part
    saved.save_to_disk(str(folder / task))
    return str(folder)


@pytest.mark.parametrize("task", SIZES)
def test_a_folder_as_datasets_saves_it(task, tmp_path):
    size = 1040 if task in glue.LARGE else 40
    parts = glue.splits(task, save(task, tmp_path, size), 42)
    rows, known = made(task, size), glue.TASKS[task]
    second = rows[known.columns[1]] if len(known.columns) == 2 else [None] * size
    every = [Example(*row) for row in zip(rows[known.columns[0]], rows["label"], second, strict=True)]
    validation, test = glue.divide(task, size, 42)
    assert parts.validation == [every[i] for i in validation]
    assert parts.test == [every[i] for i in test]
    assert len(parts.train) == 32


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_folder_of_files_as_the_hub_has_them(ending, tmp_path):
    for name, n in (("train-00000-of-00002", 3), ("train-00001-of-00002", 4), ("validation-00000-of-00001", 6)):
        part = datasets.Dataset.from_dict(made("rte", n))
        file = tmp_path / "rte" / f"{name}.{ending}"
        file.parent.mkdir(exist_ok=True)
        part.to_parquet(file) if ending == "parquet" else part.to_json(file)
    train, validation = glue.read("rte", str(tmp_path))
    rows = [made("rte", n) for n in (3, 4)]
    assert [e.text for e in train] == rows[0]["sentence1"] + rows[1]["sentence1"]
    assert [(e.pair, e.label) for e in validation] == list(
        zip(*(made("rte", 6)[k] for k in ("sentence2", "label")), strict=True)
    )


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("rte", {"label": [-1] * 40}, r"train, item 1: label = -1, expected 0 \(entailment\) or 1 \(not_entailment\)"),
        ("rte", {"label": [2] + [0] * 39}, "item 1: label = 2"),
        ("rte", {"label": ["entailment"] * 40}, "label = 'entailment'"),
        ("stsb", {"label": [math.nan] * 40}, "label = nan, expected a number"),
        ("rte", {"sentence2": [None] * 40}, "sentence2 = None is no text"),
    ],
)
def test_examples_that_are_none(task, changes, words, tmp_path):
    (tmp_path / task).mkdir()
    for name in ("train", "validation"):
        datasets.Dataset.from_dict(made(task, 40) | changes).to_parquet(tmp_path / task / f"{name}.parquet")
    with pytest.raises(DataError, match=words):
        glue.read(task, str(tmp_path))


def test_a_folder_of_another_task_and_one_of_nothing(tmp_path):
    (tmp_path / "rte").mkdir()
    for name in ("train", "validation"):
        datasets.Dataset.from_dict(made("cola", 4)).to_json(tmp_path / "rte" / f"{name}.jsonl")
    with pytest.raises(DataError, match="there is no column 'sentence1'; did you mean 'sentence'"):
        glue.read("rte", str(tmp_path))
    with pytest.raises(
        DataError, match=r"(?s)does not hold qqp.*load_dataset\('nyu-mll/glue', 'qqp'\).save_to_disk.*data.source="
    ):
        glue.read("qqp", str(tmp_path))
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="sst2 cannot be read"):
        glue.read("sst2", str(tmp_path))


def test_what_is_neither_a_folder_nor_on_the_hub(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"(?s)there is no folder 'nobody/nothing'.*load_dataset\('nyu-mll/glue', 'rte'\)"):
        glue.read("rte", "nobody/nothing")


# ---------------------------------------------------------------- metrics


def test_the_metrics_are_their_formulas():
    draw = np.random.default_rng(0)
    labels, predicted = draw.integers(0, 2, 50), draw.integers(0, 2, 50)
    task = TextTask(("no", "yes"), ("accuracy", "f1", "matthews"))
    part = [Example("", int(label)) for label in labels]
    (tp, fp, fn, tn) = (int(((predicted == p) & (labels == t)).sum()) for p, t in ((1, 1), (1, 0), (0, 1), (0, 0)))
    expected = {
        "accuracy": (tp + tn) / 50,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "matthews": (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
    }
    assert text.scores(torch.from_numpy(predicted), part, task) == pytest.approx(expected, rel=1e-6)


def test_the_correlations_are_their_formulas():
    draw = np.random.default_rng(0)
    labels = draw.normal(size=50)
    predicted = np.exp(labels + 0.5 * draw.normal(size=50))
    part = [Example("", float(label)) for label in labels]
    found = text.scores(torch.from_numpy(predicted), part, RATED["rating"])
    pearson = np.corrcoef(predicted, labels)[0, 1]
    spearman = np.corrcoef(predicted.argsort().argsort(), labels.argsort().argsort())[0, 1]
    expected = {"pearson": pearson, "spearman": spearman, "average": (pearson + spearman) / 2}
    assert found == pytest.approx(expected, rel=1e-6)
    assert set(text.scores(torch.ones(50), part, RATED["rating"]).values()) == {0.0}  # a constant correlates with nothing


# ---------------------------------------------------------------- the recipes


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> str:
    """RoBERTa-base as its configuration describes it: a folder with the sizes, without weights."""
    folder = tmp_path_factory.mktemp("roberta-base")
    RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1).save_pretrained(folder)
    return str(folder)


COUNTS = {
    "full": 124_055_040,
    "bitfit": 101_376,
    "ia3": 55_296,
    "loreft": 18_444,
    "red": 18_432,
    "lora": 294_912,
    "adapter_ffn": 304_320,
    "adapter": 387_312,
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_on_the_real_shapes(recipe, shape):
    """What trains: the adapter as the paper's table counts it, and the head, which it leaves out."""
    runs = read(recipe).runs()
    tasks = [run.task for _, run in runs]
    assert tasks == [recipe.stem] * 5 if recipe.stem in SIZES else sorted(tasks) == sorted([*SIZES] * 5)
    assert {run.seed for _, run in runs} == {42, 43, 44, 45, 46}
    assert {run.data.max_tokens for _, run in runs} == {256}
    for _, run in runs[::5]:
        assert run.published is not None
        assert run.published.of(run)
        labels = classification.text_task(run).labels
        model = skeleton(shape, labels)
        experiments.adapt(model, run)
        head = 768 * 768 + 768 + 768 * len(labels) + len(labels)
        count = COUNTS.get(recipe.stem, 294_936)
        assert delora.summary(model).trainable == count + head, run.name


def test_loreft_has_the_settings_of_its_own_example():
    """CoLA's: -p f3 -e 60 -lr 4e-4 --dropout 0.2 --warmup_ratio 0.005 --weight_decay 0, in batches of 32."""
    runs = {run.task: run for _, run in read(ROOT / "paper" / "recipes" / "glue" / "loreft.toml").runs()}
    cola = runs["cola"]
    assert (cola.train.epochs, cola.train.batch_size, cola.train.lr) == (60, 32, 4e-4)
    assert (runs["rte"].train.epochs, runs["rte"].train.batch_size) == (80, 32)  # DeLoRA's: theirs are not published
    for run in runs.values():
        assert (run.adapter.dropout, run.train.warmup, run.train.weight_decay, run.adapter.build().first) == (
            0.2,
            0.005,
            0.0,
            3,
        )


# The paper's Table 9: lam, rate, batch, epochs, dropout; its text: 3e-3 for lam on the large tasks, 1e-2 on the small.
TABLE_9 = {
    "mnli": (12, 1e-3, 32, 30, 0),
    "sst2": (12, 1e-3, 32, 30, 0.1),
    "mrpc": (4, 3e-2, 32, 40, 0.2),
    "cola": (4, 1e-2, 8, 80, 0.2),
    "qnli": (12, 3e-3, 32, 25, 0.25),
    "qqp": (12, 3e-3, 32, 25, 0.1),
    "rte": (4, 1e-2, 32, 80, 0),
    "stsb": (12, 1e-2, 8, 40, 0.2),
}


@pytest.mark.parametrize("task", TABLE_9)
def test_the_recipes_have_the_papers_values(task):
    run = read(ROOT / "paper" / "recipes" / "glue" / f"{task}.toml")
    method, train = run.adapter.build(), run.train
    assert (method.lam, train.lr, train.batch_size, train.epochs, run.adapter.dropout) == TABLE_9[task]
    assert train.lam_lr == (3e-3 if task in ("mnli", "sst2", "qnli", "qqp") else 1e-2)
    assert (method.r, run.adapter.targets, train.weight_decay, train.lam_weight_decay) == (8, ["query", "value"], 0.01, 0.01)


def test_a_published_figure_is_for_its_own_model_and_task():
    recipe = ROOT / "paper" / "recipes" / "glue" / "cola.toml"
    for model, task, holds in (
        ("a/b/roberta-base", "cola", True),
        ("roberta-base/", "rte", False),
        ("roberta-large", "cola", False),
    ):
        run = read(recipe, [f"model={model}", f"task={task}"])
        assert run.published.of(run) is holds
    recipe = ROOT / "paper" / "recipes" / "subject" / "lora.toml"
    for changes, holds in (([], True), (["subject.word=dog"], False)):
        run = read(recipe, changes)
        assert run.published.of(run) is holds


def test_the_parts_of_glue_have_no_size_to_choose():
    with pytest.raises(ConfigError, match=r"data\.train is for the rated sentences; the parts of cola are GLUE's own"):
        read(ROOT / "paper" / "recipes" / "glue" / "cola.toml", ["data.train=100"])
    with pytest.raises(ConfigError, match=r"task = 'colla'"):
        read(ROOT / "paper" / "recipes" / "glue" / "cola.toml", ["task=colla"])


# ---------------------------------------------------------------- end to end, on a small random RoBERTa


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [*special, *tiny.GOOD, *tiny.BAD, *tiny.OTHER]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=len(words), max_position_embeddings=40, type_vocab_size=1, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=36, **names).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("task", SIZES)
def test_each_task_from_end_to_end(task, roberta, tmp_path):
    """The recipe itself, with another model, made data, and two steps."""
    source = save(task, tmp_path / "data", 1040 if task in glue.LARGE else 40, train=16)
    small = ["train.epochs=2", "train.batch_size=16", "seeds=[42, 43]", "data.max_tokens=32", "adapter.r=2"]
    changes = [*small, f"model={roberta}", f"data.source={source}", f"out={tmp_path / 'out'}"]
    experiment = read(ROOT / "paper" / "recipes" / "glue" / f"{task}.toml", changes)
    summary = experiments.train(classification, experiment, Console(quiet=True))
    known = glue.TASKS[task]
    assert [(r.seed, r.metric, r.reported, set(r.scores)) for r in summary.results] == [
        (seed, known.metrics[0], known.reported, set(known.metrics)) for seed in (42, 43)
    ]
    assert all(r.test == r.scores[r.reported] for r in summary.results)
    assert set(summary.agreement.values()) == {summary.test}
    # The delivered adapter, evaluated anew, has the scores of the run it is of.
    best = next(r for r in summary.results if r.name == summary.delivered)
    seed = parse(json.loads((tmp_path / "out" / "variants" / best.folder / "config.json").read_text()))
    again, n = classification.evaluate(seed, tmp_path / "out" / "adapter")
    assert (again, n) == (pytest.approx(best.scores, abs=1e-6), summary.test)
    assert f"Test {known.reported} [%]" in write(tmp_path / "out", find(task)).read_text()


def test_seeds_and_variants_are_runs_and_the_split_follows_the_seed(roberta, tmp_path):
    source = save("rte", tmp_path / "data", 40, train=16)
    data = {"source": source, "max_tokens": 32}
    adapter = {"method": "lora", "r": 2, "targets": ["query"], "also_train": ["classifier"]}
    recipe = {
        "task": "rte",
        "name": "x",
        "out": str(tmp_path / "out"),
        "model": roberta,
        "data": data,
        "adapter": adapter,
        "seeds": [1, 2],
    }
    variants = [{"name": "a", "row": "LoRA"}, {"name": "b", "row": "LoRA", "train": {"lr": 1e-2}}]
    experiment = parse(recipe | {"variants": variants, "train": {"epochs": 1}})
    assert parse(experiment.model_dump(mode="json")) == experiment
    runs = [run for _, run in experiment.runs()]
    assert [run.name for run in runs] == ["a, seed 1", "a, seed 2", "b, seed 1", "b, seed 2"]
    first, second = (classification.read_splits(run).test for run in runs[:2])
    assert first == classification.read_splits(runs[2]).test != second
    experiments.train(classification, experiment, Console(quiet=True))
    results = Outcome.read(tmp_path / "out").results
    assert [(r.row, r.setting, r.seed) for r in results] == [("LoRA", s, n) for s in "ab" for n in (1, 2)]
    for change, words in (("seed=3", "change seeds"), ("variants=[{name='a', seed=1}]", "is for all variants")):
        with pytest.raises(ConfigError, match=words):
            parse(experiment.model_dump(mode="json"), [change])


def test_the_first_metric_selects_and_a_tie_keeps_the_earlier_epoch(roberta, tmp_path):
    """STS-B by Pearson; with a rate of zero every epoch is the same, and the first stays."""
    source = save("stsb", tmp_path / "data", 40, train=16)
    changes = [f"model={roberta}", f"data.source={source}", f"out={tmp_path / 'out'}", "seeds=[]", "data.max_tokens=32"]
    changes += ["train.epochs=3", "train.lr=0.0", "train.lam_lr=0.0", "adapter.r=2"]
    (result,) = experiments.train(
        classification, read(ROOT / "paper" / "recipes" / "glue" / "stsb.toml", changes), Console(quiet=True)
    ).results
    (run,) = (tmp_path / "out" / "variants").iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = [row for row in rows if "validation_pearson" in row]
    assert len(seen) == 3
    assert {"validation_spearman", "validation_average", "validation_loss"} <= set(seen[0])
    assert (result.best_epoch, result.validation) == (1, seen[0]["validation_pearson"])
