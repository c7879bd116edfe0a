"""A dozen types over all kinds. ``make zoo`` runs every type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import delora
from tests.zoo.build import NotBuilt, build, types
from tests.zoo.configs import Tiny, given
from tests.zoo.inputs import find
from tests.zoo.laws import LAWS, Outcome, Said, check
from tests.zoo.timms import timm

pytestmark = pytest.mark.filterwarnings("default")
KINDS = [
    *("llama", "gpt2", "t5", "bert", "vit", "clip", "wav2vec2", "whisper", "mixtral", "mamba"),
    *("diffusers:UNet2DConditionModel", "diffusers:PixArtTransformer2DModel", "timm:vit_tiny_patch16_224"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_no_law_comes_out_wrong(kind: str) -> None:
    if kind.startswith("timm:") and isinstance(why := timm(), str):
        pytest.skip(why)
    built = build(kind)
    outcomes = dict(check(built.model, built.inputs))
    assert set(outcomes) == set(LAWS)
    assert not {law: outcome.words for law, outcome in outcomes.items() if outcome.kind in ("wrong", "refused")}
    assert outcomes["saved"].kind == outcomes["merged"].kind == outcomes["start"].kind == "right"


class Passed(nn.Module):
    """A model whose parent multiplies by a layer's weight and never calls the layer ``b``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def test_a_layer_that_never_runs_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {"x": torch.randn(2, 8)}
    assert dict(check(Passed(), x))["gradients"].kind == "named"
    monkeypatch.setattr(Said, "names", lambda *_: False)
    monkeypatch.setattr(Said, "counts", lambda *_: False)
    outcome = dict(check(Passed(), x))["gradients"]
    assert outcome == Outcome("wrong", "1 of 2 never ran, never named: b")


def test_a_start_elsewhere_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    inject = delora.inject
    monkeypatch.setattr(delora, "inject", lambda m, method, *a, **k: inject(m, delora.ETHER(), *a, **k))
    outcomes = dict(check(Passed(), {"x": torch.randn(2, 8)}))
    assert outcomes["start"].kind == "wrong"
    assert "gap" in outcomes["start"].words


def test_an_error_from_deep_inside_is_wrong_and_one_in_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {"x": torch.randn(2, 8)}
    inject = delora.inject
    monkeypatch.setattr(delora, "inject", lambda m, method, *a, **k: inject(m, method, ["c"]))
    assert [(law, outcome.kind) for law, outcome in check(Passed(), x)] == [("inject", "refused")]
    monkeypatch.setattr(delora, "inject", lambda m, *a, **k: {}["c"])
    assert [(law, outcome.kind) for law, outcome in check(Passed(), x)] == [("inject", "wrong")]


def test_laws_after_the_time_are_skipped() -> None:
    outcomes = dict(check(Passed(), {"x": torch.randn(2, 8)}, seconds=-1))
    assert outcomes["saved"] == Outcome("skipped", "more than -1 seconds had passed")


def test_configurations_are_cut_by_name_and_fields_can_be_kept_or_set() -> None:
    tiny = Tiny(0)
    small = tiny(given("bert"))
    assert (small.hidden_size, small.num_hidden_layers, small.vocab_size) == (64, 2, 128)
    assert {"hidden_size", "num_hidden_layers"} <= set(tiny.changed)
    kept = Tiny(0, keep={"hidden_size"}, put={"num_hidden_layers": 3})(given("bert"))
    assert (kept.hidden_size, kept.num_hidden_layers) == (768, 3)


def test_inputs_are_mended_by_what_the_errors_say() -> None:
    class Odd(nn.Module):
        config = given("bert")

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(11, 4)

        def forward(self, features: torch.Tensor, needed_mask: torch.Tensor) -> torch.Tensor:
            return self.first(features) * needed_mask[:, :1, None]

    inputs = find(Odd()).inputs
    assert inputs["features"].shape[-1] == 11


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(NotBuilt, match="no model class with a forward"):
        build("idefics_perciever")
    assert len(types()) > 800
