"""1j. Within `merged` and `disabled` nothing changes the structure; they nest where that means something."""

from __future__ import annotations

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
    "strength": lambda model, folder: delora.strength(model, 0.5),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("context", ["merged", "disabled"])
def test_structural_change_inside_a_context_is_refused_in_words(call, context, tmp_path):
    model, x = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])), ids()
    delora.save(model, tmp_path)
    expected = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with getattr(delora, context)(model):
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


@pytest.mark.parametrize("context", ["merged", "disabled"])
def test_an_error_inside_leaves_the_model_as_it_was(context):
    model, x = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"])), ids()
    expected = model(x)
    with pytest.raises(KeyError), getattr(delora, context)(model):
        raise KeyError
    assert torch.equal(model(x), expected)
    delora.strength(model, 0.5)  # no context is left open


def test_what_reads_the_adapter_says_where_it_is(tmp_path):
    model = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"]))
    for context in (delora.merged, delora.disabled):
        with context(model):
            for call in (lambda: delora.save(model, tmp_path / "x"), lambda: delora.distances(model)):
                with pytest.raises(ValueError, match=rf"inside delora.{context.__name__}\(model\) no adapter is active"):
                    call()
            with pytest.raises(ValueError, match="inside delora"):
                delora.export.peft(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
