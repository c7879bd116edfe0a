"""1j. Within `merged`, `disabled` and `routed` nothing changes the structure; they nest where that means something."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import delora
from delora import DeLoRA, LoRA
from tests.cases import Net, ids, shake

CALLS = {
    "inject": lambda model, folder: delora.inject(model, LoRA(r=2), ["v"], name="new"),
    "load": lambda model, folder: delora.load(model, folder, name="new"),
    "eject": lambda model, folder: delora.eject(model),
    "activate": lambda model, folder: delora.activate(model, "default"),
    "blend": lambda model, folder: delora.blend(model, {"default": 1.0}, "new"),
    "merge": lambda model, folder: delora.merge(model),
    "merged": lambda model, folder: delora.merged(model).__enter__(),
    "routed": lambda model, folder: delora.routed(model, ["default"] * 4).__enter__(),
    "serving": lambda model, folder: delora.serving(model).__enter__(),
    "strength": lambda model, folder: delora.strength(model, 0.5),
    "choose_strength": lambda model, folder: delora.choose_strength(model, lambda model: 0.0),
}
CONTEXTS = {
    "disabled": delora.disabled,
    "merged": delora.merged,
    "routed": lambda model: delora.routed(model, NAMES),
    "serving": delora.serving,
}
NAMES = ["default", None, "default", "default"]
X = torch.arange(24).reshape(4, 6) % 20
OTHERS = {
    "model(x)": lambda model, folder: model(X),
    "disabled": lambda model, folder: delora.disabled(model).__enter__(),
    "save": lambda model, folder: delora.save(model, folder / "new"),
    "export.peft": lambda model, folder: delora.export.peft(model, folder / "new"),
    "distances": lambda model, folder: delora.distances(model),
}
GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in GUIDE.read_text().partition("## Contexts")[2].partition("\n## ")[0].splitlines()
    if line.startswith("| `")
]


@pytest.mark.parametrize(("call", "column"), [(call, column) for call in {**CALLS, **OTHERS} for column in (1, 2, 3, 4)])
def test_the_guides_table_of_contexts_is_carried_out(call, column, tmp_path):
    (row,) = [row for row in TABLE if f"`{call}`" in row[0].split(", ")]
    model = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"])).eval()
    delora.save(model, tmp_path)
    outputs = {"the adapted model": model(X)}
    with delora.disabled(model):
        outputs["the base model"] = model(X)
    rows = torch.tensor([[name is not None] for name in NAMES])
    outputs["each row with its adapter"] = torch.where(rows, *outputs.values())
    with list(CONTEXTS.values())[column - 1](model):
        act = {**CALLS, **OTHERS}[call]
        if row[column] == "refused":
            with pytest.raises(ValueError, match="inside delora"):
                act(model, tmp_path)
        else:
            result = act(model, tmp_path)
            if row[column] in outputs:
                torch.testing.assert_close(result, outputs[row[column]])
            else:
                assert row[column] == "works"


def test_a_context_holds_for_all_threads():
    model, outputs = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"])).eval(), []
    with delora.disabled(model):
        here = model(X)
        thread = threading.Thread(target=lambda: outputs.append(model(X)))
        thread.start()
        thread.join()
    assert torch.equal(outputs[0], here)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_structural_change_inside_a_context_is_refused_in_words(call, context, tmp_path):
    model, x = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])).eval(), ids()
    delora.save(model, tmp_path)
    expected = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with CONTEXTS[context](model):
        inside = model(x)
        with pytest.raises(ValueError, match=rf"{call} inside delora.{context}\(model\): leave that context first"):
            CALLS[call](model, tmp_path)
        assert torch.equal(model(x), inside)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == list(state)


def test_disabled_nests_and_knows_no_merged():
    model, x = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"])), ids()
    expected = model(x)
    with delora.disabled(model):
        base = model(x)
        with delora.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), expected)
    with (
        delora.merged(model),
        pytest.raises(ValueError, match=r"disabled inside delora.merged\(model\)"),
        delora.disabled(model),
    ):
        pass


@pytest.mark.parametrize("context", CONTEXTS)
def test_an_error_inside_leaves_the_model_as_it_was(context):
    model, x = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"])).eval(), ids()
    expected = model(x)
    with pytest.raises(KeyError), CONTEXTS[context](model):
        raise KeyError
    assert torch.equal(model(x), expected)
    delora.strength(model, 0.5)  # no context is left open


def test_what_reads_the_adapter_says_where_it_is(tmp_path):
    model = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"]))
    for name, context in CONTEXTS.items():
        with context(model):
            for call in (lambda: delora.save(model, tmp_path / "x"), lambda: delora.distances(model)):
                with pytest.raises(ValueError, match=rf"inside delora.{name}\(model\) no adapter is active"):
                    call()
            with pytest.raises(ValueError, match="inside delora"):
                delora.export.peft(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
