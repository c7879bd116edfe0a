"""What a reader can copy runs; links lead somewhere; the README is short."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from delora import METHODS, DeLoRA
from delora.training import defaults

ROOT = Path(__file__).parents[1]


def snippets(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", file.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the snippets take for granted: a model (tiny here), some batches, a working folder."""
    monkeypatch.chdir(tmp_path)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertForSequenceClassification(config).save_pretrained("roberta-base")
    rows = [{"input_ids": torch.randint(0, 50, (6,)), "labels": torch.tensor(i % 2)} for i in range(4)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    options = dict(output_dir="out", max_steps=2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True)
    return {"loader": [batch] * 3, "dataset": rows, "arguments": TrainingArguments(**options)}


def test_the_snippets_of_the_readme_run_one_after_the_other(names):
    for code in snippets(ROOT / "README.md"):
        exec(code, names)
    assert Path("merged/model.safetensors").exists()
    assert Path("adapter-lora/adapter_config.json").exists()


def test_the_snippets_of_the_docs_run(names):
    exec(snippets(ROOT / "README.md")[0], names)
    for file in sorted((ROOT / "docs").glob("*.md")):
        for code in snippets(file):
            exec(code, names)


def test_the_page_of_the_methods_is_made_from_what_the_methods_say():
    """Run python -m docs.generate after a change of a docstring or a count."""
    from docs import generate

    text = generate.FILE.read_text("utf-8")
    assert text == generate.page()
    for method in METHODS.values():
        equation = (method.__doc__ or "").split("    ")[0].strip()
        assert f"\n## {method.__name__}\n\n    {equation}" in text


@pytest.mark.parametrize(("page", "least"), [("fidelity", 21), ("export", 13)])
def test_every_test_that_a_page_names_exists(page, least):
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+)`", text)
    code = "".join(file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) >= least
    assert not [name for name in named if f"def {name}(" not in code]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_page_of_settings_starts_where_the_program_does_and_quotes_what_was_measured():
    """Its second column is what `delora finetune` sets, and every figure stands in a page that is linked beside it."""
    file = ROOT / "docs" / "choosing.md"
    said = dict(re.findall(r"^\| [a-z ?]+ `(\w+)` \| `(.+?)` \|", file.read_text("utf-8"), re.MULTILINE))
    ours = [*defaults.adapter("delora", True, ["classifier"]), *defaults.training("delora", 400, head=True)]
    settings = {setting.key.rpartition(".")[2]: setting.value for setting in ours}
    method = DeLoRA(r=settings["r"], reach=settings["reach"])
    for key, value in said.items():
        assert tomllib.loads(f"x = {value}")["x"] == settings.get(key, getattr(method, key, None)), key
    assert said.keys() >= {"r", "reach", "learn_lam", "start", "lr", "head_lr", "targets"}

    prose = re.sub(r"```.*?```|`[^`\n]+`", "", file.read_text("utf-8"), flags=re.DOTALL)
    for piece in [line for line in prose.splitlines() if line.startswith("|")] + prose.split("\n## "):
        linked = [(file.parent / target).read_text("utf-8") for target in re.findall(r"\]\(([^)]+\.md)\)", piece)]
        for figure in re.findall(r"[+-]?\d+\.\d+(?: ± \d+\.\d+)?", piece):
            found = [re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", text) for text in linked]
            assert any(found), f"{figure} is in no page that is linked there: {piece[:60]}"


PAGES = [file for file in ROOT.rglob("*.md") if not {"runs", ".venv", ".pytest_cache"} & set(file.relative_to(ROOT).parts)]


@pytest.mark.parametrize("file", sorted(PAGES), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text("utf-8")):
        assert (file.parent / target).exists(), target
