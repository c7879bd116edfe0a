"""Names to layers, what trains, switching, and errors before anything is changed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import delora
from delora import DeLoRA, Full, LoRA
from delora.models import adapted_layers, adapters
from delora.updates import LowRank
from tests.cases import Holder, Net, ids, shake


class Blocks(nn.Module):
    """Twelve blocks, so that a suffix must not match inside a word: 1 is not 11, q is not seq."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "seq": nn.Linear(4, 4)}) for _ in range(12))
        self.act = nn.ReLU()


def targets_of(*args, **kwargs):
    return list(adapted_layers(delora.inject(*args, **kwargs)))


def test_a_list_is_matched_by_suffix_at_dots():
    assert targets_of(Blocks(), LoRA(2), ["q"]) == [f"layer.{i}.q" for i in range(12)]
    assert targets_of(Blocks(), LoRA(2), ["1.q", "layer.3.seq"]) == ["layer.1.q", "layer.3.seq"]


def test_a_regex_is_matched_as_a_whole():
    assert targets_of(Blocks(), LoRA(2), r"layer\.\d\.q") == [f"layer.{i}.q" for i in range(10)]
    with pytest.raises(ValueError, match=r"no module's whole name matches .* a name looks like 'layer.0.q'"):
        delora.inject(Blocks(), LoRA(2), r"\d\.q")


def test_exclude_takes_names_away():
    assert targets_of(Blocks(), LoRA(2), "all-linear", exclude=["seq"]) == [f"layer.{i}.q" for i in range(12)]
    assert targets_of(Blocks(), LoRA(2), ["q"], exclude=r"layer\.1\d\.q|layer\.[1-9]\.q") == ["layer.0.q"]


def test_all_linear_leaves_out_what_also_trains():
    assert targets_of(Net(), LoRA(2), "all-linear", also_train=["classifier"]) == ["q", "v", "classifier"]


def test_overrides_change_fields_of_the_layers_they_find():
    model = delora.inject(
        Blocks(), DeLoRA(r=1, lam=2.0), ["q"], overrides={r"layer\.1\d?\.": {"r": 4, "lam": 8.0}, r"\.11\.": {"r": 3}}
    )
    methods = {name: layer.adapter.method for name, layer in adapted_layers(model).items()}
    assert methods["layer.1.q"] == methods["layer.10.q"] == DeLoRA(r=4, lam=8.0)
    assert methods["layer.11.q"] == DeLoRA(r=3, lam=8.0)
    assert methods["layer.2.q"] == DeLoRA(r=1, lam=2.0)


@pytest.mark.parametrize(("method", "learned"), [(DeLoRA(r=2), ()), (DeLoRA(r=2, learn_lam=True), ("lam",))], ids=str)
def test_only_what_should_train_trains(method, learned):
    model = delora.inject(Net(), method, ["q"], also_train=["classifier"])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"q.adapters.default.{t}" for t in ("A", "B", *learned)} | {
        f"classifier.adapters.default.module.{i}.{t}" for i in (0, 2) for t in ("weight", "bias")
    }


def test_modules_trained_whole_leave_the_original_alone():
    model = Net()
    x, before = ids(), None
    before = model(x)
    delora.inject(model, DeLoRA(r=2), ["q"], also_train=["classifier"])
    torch.testing.assert_close(model(x), before)
    shake(model)
    full = model(x)
    with delora.disabled(model):
        assert torch.equal(model(x), before)
    delora.strength(model, 0)
    assert torch.equal(model(x), before)
    delora.strength(model, 1)
    assert torch.equal(model(x), full)
    delora.strength(model, 0.5)
    assert not torch.equal(model(x), full)
    merged = delora.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), model(x))
    assert type(merged.classifier) is nn.Sequential


def test_adapters_have_names_and_one_is_active():
    model, x = Net().eval(), ids()
    base = model(x)
    shake(delora.inject(model, LoRA(r=2), ["q"], also_train=["classifier"], name="a"))
    out_a = model(x)
    shake(delora.inject(model, DeLoRA(r=2), ["q", "v"], name="b"))
    out_b = model(x)
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    delora.activate(model, "a")
    assert torch.equal(model(x), out_a)
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"a"}
    delora.activate(model, "b")
    assert torch.equal(model(x), out_b)
    with pytest.warns(UserWarning, match=r"'b' was the active adapter: none is active now; delora.activate one of \['a'\]"):
        delora.eject(model, "b")
    assert torch.equal(model(x), base)
    assert list(adapted_layers(model)) == ["q", "classifier"]
    with pytest.raises(ValueError, match=r"no adapter is active: delora.activate one of \['a'\]"):
        delora.distances(model)
    delora.activate(model, "a")
    assert torch.equal(model(x), out_a)
    delora.eject(model)
    assert torch.equal(model(x), base)
    assert not adapted_layers(model)
    assert "_delora" not in model.__dict__


def test_an_adapter_that_went_astray_can_be_turned_off():
    model, x = Net(), ids()
    before = model(x)
    delora.inject(model, LoRA(2), ["q"])
    model.q.adapter.B.data[:] = float("nan")
    assert model(x).isnan().any()
    delora.strength(model, 0)
    assert torch.equal(model(x), before)
    assert torch.equal(delora.merge(model)(x), before)


def test_eject_restores_what_trained_before():
    model = Net()
    model.emb.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    delora.eject(delora.inject(model, LoRA(2), ["q"], also_train=["classifier"]))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    delora.merge(delora.inject(model, LoRA(2), ["q"], also_train=["classifier"]))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_module_in_two_places_is_adapted_in_both():
    model = nn.Module()
    model.first = model.second = nn.Linear(4, 4)
    delora.inject(model, LoRA(2), ["second"])
    assert model.first is model.second
    assert list(adapted_layers(model)) == ["first"]
    delora.eject(model)
    assert type(model.first) is nn.Linear
    assert model.first is model.second


def test_disabled_comes_back_after_an_exception():
    model, x = shake(delora.inject(Net(), LoRA(2), ["q"])), ids()
    before = model(x)
    with pytest.raises(KeyError), delora.disabled(model):
        raise KeyError
    assert torch.equal(model(x), before)


def test_every_trainable_tensor_is_in_exactly_one_group():
    model = delora.inject(Net(), DeLoRA(r=2, learn_lam=True), ["q", "v"], also_train=["classifier"])
    groups = delora.param_groups(model, lr=1e-2, lam_lr=1e-3, head_lr=1e-4, weight_decay=0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    by_name = {group["name"]: group for group in groups}
    assert by_name["lam"]["params"] == [model.q.adapter.lam, model.v.adapter.lam]
    assert (by_name["lam"]["lr"], by_name["lam"]["weight_decay"]) == (1e-3, 0)
    assert (by_name["adapter"]["lr"], by_name["adapter"]["weight_decay"]) == (1e-2, 0.1)
    assert (by_name["head"]["lr"], by_name["head"]["weight_decay"]) == (1e-4, 0.1)
    assert by_name["head vectors"]["weight_decay"] == 0  # biases
    assert all(p.ndim == 1 for p in by_name["head vectors"]["params"])
    decayed = delora.param_groups(model, lr=1e-2, weight_decay=0.1, lam_weight_decay=0.01)
    assert {g["name"]: g["weight_decay"] for g in decayed}["lam"] == 0.01
    torch.optim.AdamW(groups)


def test_without_a_learned_lam_there_is_no_group_for_it_and_its_rate_is_refused():
    model = delora.inject(Net(), DeLoRA(r=2), ["q", "v"])
    groups = delora.param_groups(model, lr=1e-2, lam_lr=0.0)
    assert [(group["name"], len(group["params"])) for group in groups] == [("adapter", 4)]
    for rate in ({"lam_lr": 1e-3}, {"lam_weight_decay": 0.01}):
        (key,) = rate
        with pytest.raises(ValueError, match=rf"{key} = .*: no strength lam of this model is learned; leave {key} out"):
            delora.param_groups(model, lr=1e-2, **rate)
    mixed = delora.inject(Net(), DeLoRA(r=2), ["q", "v"], overrides={"v": {"learn_lam": True}})
    by_name = {group["name"]: group for group in delora.param_groups(mixed, lr=1e-2, lam_lr=1e-3)}
    assert (by_name["lam"]["params"], by_name["lam"]["lr"]) == ([mixed.v.adapter.lam], 1e-3)
    delora.inject(model, LoRA(r=2), ["q"], name="other")  # the fixed lam of an adapter that is not active is of no account
    assert {group["lr"] for group in delora.param_groups(model, lr=1e-2, lam_lr=1e-3)} == {1e-2}


def test_every_parameter_has_a_dimension():
    """FSDP2 refuses 0-d parameters."""
    model = delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])
    assert all(p.ndim > 0 for p in model.parameters())


def test_summary_counts():
    model = delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])
    report = delora.summary(model)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.base == sum(p.numel() for p in Net().parameters())
    assert f"{report.trainable:,} of the base model's {report.base:,} parameters" in str(report)


def test_layers_train_or_not_as_the_model_does():
    model = Net().eval()
    delora.inject(model, LoRA(2), ["q"], dropout=0.5)
    assert not model.q.adapter.training
    assert model.train().q.adapter.training


# ---------------------------------------------------------------- errors

BAD = [
    (dict(targets=["qeury"]), ValueError, r"no module ends with 'qeury' \(targets\); did you mean 'query'"),
    (dict(targets=["zzz"]), ValueError, r"no module ends with 'zzz' \(targets\); names end with "),
    (dict(targets=[]), ValueError, "leaves no layer to adapt"),
    (dict(targets=["query"], exclude=["query"]), ValueError, "leaves no layer to adapt"),
    (dict(targets=["query"], exclude=["valeu"]), ValueError, r"\(exclude\); did you mean 'value'"),
    (dict(targets=[3]), TypeError, "targets must be a regular expression or a list of names, got 3"),
    (dict(targets="["), ValueError, "is not a regular expression"),
    (dict(targets="uery"), ValueError, r"a list such as \['uery'\] is matched by suffix"),
    (
        dict(targets=["act"]),
        TypeError,
        "act: cannot adapt a ReLU: known layers are .*Conv1D, Conv1d, Conv2d, Conv3d, Embedding, .*Linear",
    ),
    (dict(targets=["query"], dropout=-0.1), ValueError, "dropout = -0.1: must be a probability"),
    (dict(targets=["query"], dropout=1.0), ValueError, "dropout = 1.0: must be"),
    (dict(targets=["query"], dropout=float("nan")), ValueError, "dropout = nan: must be"),
    (dict(targets=["query"], also_train=["head.x"]), ValueError, r"no module ends with 'head.x' \(also_train\)"),
    (dict(targets=["head"], also_train=["head"]), ValueError, "'head' is named twice"),
    (dict(targets=["0"], also_train=["head"]), ValueError, "'head.0' is named twice"),
    (
        dict(targets=["query"], overrides={"layer9": {"r": 2}}),
        ValueError,
        "overrides: no adapted layer's name contains 'layer9'",
    ),
    (
        dict(targets=["query"], overrides={"query": {"rank": 2}}),
        ValueError,
        r"LoRA has no field 'rank'; its fields are \['r', 'alpha'",
    ),
    (dict(targets=["query"], overrides={"query": {"r": 0}}), ValueError, r"overrides\['query'\]: r = 0: the rank"),
    (
        dict(targets=["query"], overrides={"query": {"r": 10000}}),
        ValueError,
        r"query: r = 10000 is more than a matrix of shape \[6, 4\]",
    ),
    (dict(targets=["query"], name="a.b"), ValueError, "name = 'a.b': an adapter's name is made of"),
    (dict(targets=["query"], name="keys"), ValueError, "no attribute of nn.ModuleDict"),
    (dict(targets=["query"], name=""), ValueError, "an adapter's name is made of"),
    (dict(targets=["grouped"], overrides={"grouped": {"r": 5}}), ValueError, r"r = 5 is more than a matrix of shape \[4, 18\]"),
    (dict(targets=["capped"]), ValueError, "capped: cannot adapt an Embedding with max_norm"),
    (dict(targets=["attention"]), TypeError, "attention: cannot adapt a MultiheadAttention"),
    (dict(targets=["scaled"]), TypeError, "cannot adapt a Scaled: it has a forward of its own"),
    (
        dict(targets=["bytes"]),
        TypeError,
        "bytes: cannot adapt a Linear: its weight is torch.uint8, so it seems to be quantised in a way",
    ),
]


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.act = nn.Linear(4, 6), nn.Linear(4, 6), nn.ReLU()
        self.head = nn.Sequential(nn.Linear(4, 2))
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.capped = nn.Embedding(4, 4, max_norm=1.0)
        self.attention = nn.MultiheadAttention(4, 2)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
        self.scaled = Scaled(4, 4)
        self.bytes = nn.Linear(4, 4)
        self.bytes.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(("arguments", "kind", "words"), BAD, ids=[words for *_, words in BAD])
def test_errors_say_what_came_and_change_nothing(arguments, kind, words):
    model = Odd()
    before = {name: (id(m), m.training) for name, m in model.named_modules()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(kind, match=words):
        delora.inject(model, LoRA(2), **arguments)
    assert {name: (id(m), m.training) for name, m in model.named_modules()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains


def test_an_encoder_layer_is_adapted_where_its_fast_path_is_off():
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        delora.inject(model, LoRA(2), ["linear1"])
        x = torch.randn(2, 3, 4)
        with torch.no_grad():
            before = model(x)
            assert not torch.allclose(shake(model)(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("method", ["delora", DeLoRA, None, object()])
def test_what_is_no_method_is_refused(method):
    with pytest.raises(TypeError, match=r"expected a method such as DeLoRA\(r=8\)"):
        delora.inject(Net(), method, ["q"])


def test_a_layer_without_a_model_around_it_is_refused():
    with pytest.raises(ValueError, match=r"a Linear has no module inside that could be replaced: wrap it, as nn.Sequential"):
        delora.inject(nn.Linear(4, 4), LoRA(2), ["weight"])


def test_a_module_with_adapted_layers_inside_is_refused():
    model = delora.inject(Net(), LoRA(2), ["classifier.0"], name="inner")
    with pytest.raises(ValueError, match="classifier: '0' inside it is adapted already"):
        delora.inject(model, LoRA(2), ["q"], also_train=["classifier"])
    assert list(adapted_layers(model)) == ["classifier.0"]


def test_wrong_names_and_values_after_injection():
    model = delora.inject(Net(), LoRA(2), ["q"])
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        delora.inject(model, LoRA(2), ["v"])
    with pytest.raises(ValueError, match=r"no adapter is named 'b': this model has \['default'\]"):
        delora.activate(model, "b")
    for bad in (-0.5, float("nan"), float("inf"), "1", True):
        with pytest.raises(ValueError, match="must be a finite number, at least 0"):
            delora.strength(model, bad)
        with pytest.raises(ValueError, match="lr = .*: must be a finite number, at least 0"):
            delora.param_groups(model, lr=bad)
    for call in (delora.distances, delora.merge, delora.summary, lambda m: delora.strength(m, 1)):
        with pytest.raises(ValueError, match="this model has no adapter: delora.inject or delora.load one first"):
            call(Net())
    with pytest.raises(ValueError, match="nothing in this model trains"):
        delora.param_groups(Net().requires_grad_(False), lr=1.0)


# ---------------------------------------------------------------- one's own


@dataclass(frozen=True)
class Diagonal:
    """W' = W + diag(d) on the first entries: a method of one's own, known to nobody."""

    def init(self, W):
        return {"d": nn.Parameter(W.new_zeros(min(W.shape)))}

    def update(self, W, p):
        out, inp = 8, 8
        eye = torch.eye(max(out, inp), dtype=p["d"].dtype)
        return LowRank(eye[:out, : len(p["d"])] * p["d"], eye[: len(p["d"]), :inp])


@dataclass(frozen=True)
class Squared:
    """W' = W + (B B') A: a method that multiplies matrices on its way to the update."""

    def init(self, W):
        return {"A": nn.Parameter(torch.randn(2, 8)), "B": nn.Parameter(torch.randn(8, 8))}

    def update(self, W, p):
        return LowRank(up=(p["B"] @ p["B"].T)[:, :2], down=p["A"])


def test_updates_are_built_in_float32_under_autocast_too():
    model, x = delora.inject(Net(), Squared(), ["q"]), ids()
    expected = model.q.adapter.update()
    with torch.autocast("cpu", torch.bfloat16):
        update = model.q.adapter.update()
        assert model(x).dtype == torch.bfloat16
    assert update.up.dtype == torch.float32
    assert torch.equal(update.up, expected.up)


class Transposed(nn.Module):
    """A layer of one's own: x W, with W stored as [in, out] under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.kernel


class TransposedHost(delora.hosts.Linear):
    weight_name = "kernel"

    def matrix(self):
        return self.layer.kernel.T

    def as_weight(self, W):
        return W.T


def test_a_method_of_ones_own_needs_no_registration(tmp_path):
    model, x = Net().eval(), ids()
    base = copy.deepcopy(model)
    before = model(x)
    delora.inject(model, Diagonal(), ["q"])
    assert torch.equal(model(x), before)
    shake(model)
    assert not torch.equal(model(x), before)
    delora.save(model, tmp_path)
    with pytest.raises(ValueError, match="unknown method 'diagonal': known are bitfit, "):
        delora.load(base, tmp_path)
    assert torch.equal(delora.load(base, tmp_path, methods=[Diagonal])(x), model(x))
    torch.testing.assert_close(delora.merge(base)(x), model(x))


def test_a_layer_of_ones_own_takes_one_line():
    model = Holder(Transposed())
    with pytest.raises(TypeError, match="cannot adapt a Transposed"):
        delora.inject(model, DeLoRA(r=2), ["layer"])
    delora.host.register(Transposed, TransposedHost)
    x = torch.randn(3, 8)
    delora.inject(model, DeLoRA(r=2), ["layer"])
    torch.testing.assert_close(model(x), model.layer.base(x))
    before = shake(model)(x)
    torch.testing.assert_close(delora.merge(model)(x), before)


def test_a_list_of_layers_is_trained_whole_as_its_layers():
    """Diffusers' U-Net iterates over lists of blocks: a list itself is never called."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])])
            self.named = nn.ModuleDict({"head": nn.Linear(4, 2)})

        def forward(self, x):
            first, more = self.inner
            for layer in more:
                x = layer(first(x))
            return self.named["head"](x)

    model, x = Deep(), torch.randn(3, 4)
    before, count = model(x), sum(p.numel() for p in model.parameters())
    delora.inject(model, Full(), "[^.]*")
    assert set(adapters(model)) == {"inner.0", "inner.1.0", "named.head"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    torch.testing.assert_close(model(x), before)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_full_is_a_method_like_any_other():
    model = delora.inject(Net(), Full(), ["classifier"])
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"classifier"}
    assert delora.distances(model) == {"classifier": 0.0}
    shake(model)
    assert delora.distances(model)["classifier"] > 0
