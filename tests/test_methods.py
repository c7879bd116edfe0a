"""What the methods promise beyond the contract that all keep: their own laws, places and errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import delora
from delora import (
    ETHER,
    HRA,
    IA3,
    METHODS,
    OFT,
    RED,
    RUNGS,
    BitFit,
    Bottleneck,
    DeLoRA,
    DoRA,
    EtherPlus,
    Full,
    LoRA,
    LoReFT,
    NBLoRA,
    Reflections,
)
from delora.diagnostics import inspect
from examples.own_method import VeRA
from tests.cases import METHODS as CASES
from tests.cases import Holder, Net, ids, placed, shake
from tests.oracles import slow

EXACT = dict(rtol=1e-12, atol=1e-12)


def right(method, W):
    """S of W' = W S, densely, for tensors that moved from their start."""
    made = placed(method, linear(W))
    with torch.no_grad():
        for tensor in made.saved().values():
            tensor.add_(torch.randn_like(tensor))
    return made.update().merge(torch.eye(W.shape[1], dtype=W.dtype)), made


def linear(W):
    layer = nn.Linear(*reversed(W.shape), bias=False, dtype=W.dtype).requires_grad_(False)
    layer.weight.copy_(W)
    return layer


@pytest.fixture
def W():
    return torch.randn(10, 12, dtype=torch.float64)


# ---------------------------------------------------------------- multiplication


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_ether_is_a_reflection_in_every_block(W, blocks):
    H, made = right(ETHER(blocks), W)
    eye = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(H @ H.T, eye, **EXACT)
    assert torch.linalg.det(H).item() == pytest.approx((-1) ** blocks)
    for at in range(0, 12, 12 // blocks):
        block = slice(at, at + 12 // blocks)
        assert (H - eye)[block, block].norm().item() == pytest.approx(2)
    torch.testing.assert_close(H, slow.ether_matrix(made.u.detach()), **EXACT)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_ether_plus_starts_at_the_identity_and_goes_no_farther_than_two(W, blocks):
    method = EtherPlus(blocks, two_sided=False)
    torch.testing.assert_close(placed(method, linear(W)).update().merge(W), W, **EXACT)
    H, _ = right(method, W)
    assert 0 < (H - torch.eye(12)).norm() <= 2 * math.sqrt(blocks)


def test_the_released_reshape_is_another_matrix(W):
    """ETHER's released code is block-diagonal for one block only; ours always is."""
    for blocks in (1, 2):
        H, made = right(ETHER(blocks), W)
        u = made.u.detach()
        released = slow.ether_released(W, [slow.ether_matrix(u[k : k + 1]) for k in range(blocks)])
        assert torch.allclose(W @ H, released) == (blocks == 1)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_oft_rotates(W, blocks):
    R, made = right(OFT(blocks), W)
    torch.testing.assert_close(R @ R.T, torch.eye(12, dtype=torch.float64), **EXACT)
    assert torch.linalg.det(R).item() == pytest.approx(1)
    s = 12 // blocks
    assert made.Q.numel() == blocks * s * (s - 1) // 2


def test_constrained_oft_stays_in_its_ball(W):
    for radius in (0.1, 0.5):
        R, _ = right(OFT(blocks=2, radius=radius), W)
        Q = torch.linalg.solve(torch.eye(12) + R, torch.eye(12) - R)  # Cayley's transform is its own inverse
        for block in (slice(0, 6), slice(6, 12)):
            assert Q[block, block].norm().item() == pytest.approx(radius)


@pytest.mark.parametrize("name", [name for name, method in CASES.items() if hasattr(method, "bound")])
def test_no_tensors_leave_the_bound(W, name):
    made = placed(CASES[name], linear(W))
    with torch.no_grad():
        for size in (1e-3, 1.0, 1e3):
            for key, tensor in made.saved().items():
                if key not in ("lam0", "sigma"):  # fixed: what the bound is made of
                    tensor.add_(size * torch.randn_like(tensor))
            change = made.update().merge(W) - W
            assert change.norm() <= made.method.bound(made.tensors()) * (1 + 1e-12)


@pytest.mark.parametrize("method", [HRA(r=4), HRA(r=3, orthogonal=True)], ids=str)
def test_hra_keeps_lengths_and_angles_of_the_rows(W, method):
    H, made = right(method, W)
    eye = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(H @ H.T, eye, **EXACT)
    assert torch.linalg.det(H).item() == pytest.approx((-1) ** method.r)
    assert torch.linalg.matrix_rank(H - eye) == method.r
    new = made.update().merge(W)
    torch.testing.assert_close(new @ new.T, W @ W.T, **EXACT)


def test_two_equal_reflections_cancel_and_orthogonal_ones_never_do(W):
    torch.testing.assert_close(placed(HRA(r=6), linear(W)).update().merge(W), W, **EXACT)
    H, _ = right(HRA(r=6, orthogonal=True), W)
    torch.testing.assert_close(torch.linalg.svdvals(H - torch.eye(12)), torch.tensor([2.0] * 6 + [0.0] * 6).double(), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("parallel", [False, True])
def test_no_singular_value_of_nb_lora_is_above_its_bound(dtype, size, parallel):
    """Also where the vectors are large and nearly parallel, as after a collapse at a far too large rate."""
    r, out, inp = 16, 200, 240
    A, B = torch.randn(r, inp, dtype=dtype), torch.randn(out, r, dtype=dtype)
    A, B = (size * M[:, :1] * M[:1] + 0.1 * M if parallel else size * M for M in (A, B))
    p = {"A": A.requires_grad_(), "B": B.requires_grad_(), "sigma": torch.tensor([0.7], dtype=dtype)}
    update = NBLoRA(r, sigma=0.7).update(None, p)
    _, sigma, _ = update.svd()
    assert sigma[0] <= 0.7 * (1 + 1e-5)
    assert sigma[-1] > 0
    (update.up @ update.down).square().sum().backward()
    assert p["A"].grad.isfinite().all()
    assert p["B"].grad.isfinite().all()


@pytest.mark.parametrize(("out", "inp"), [(10, 12), (12, 10), (9, 4)])
@pytest.mark.parametrize("shares", [[1.0, 1.0, 1.0, 1.0], [1.0, 0.5, 0.1, 1e-3], [0.3, 0.3, 0.0, 0.0]])
def test_nb_lora_reaches_every_matrix_of_its_rank_within_the_bound(out, inp, shares):
    """A and B from the singular value decomposition of the change, by the inverse of Cayley's transform."""
    r, sigma, shares = 4, 2.0, torch.tensor(shares, dtype=torch.float64)
    U, _ = torch.linalg.qr(torch.randn(out, r, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(inp, r, dtype=torch.float64))
    half = shares.asin() / 2  # 2 cos(half) sin(half) is the share
    Q = torch.cat([V * half.cos(), U * half.sin()])  # orthonormal columns
    left, _, right = torch.linalg.svd(Q[:r])
    Q = Q @ (left @ right).T  # the same product; its first r rows are now positive semidefinite, so that I + E has an inverse
    eye = torch.eye(r, dtype=torch.float64)
    inverse = torch.linalg.inv(eye + Q[:r])
    Z = 2 * inverse - eye
    G = torch.cat([(Z - Z.T) / 4, -Q[r:] @ inverse])
    torch.testing.assert_close(slow.cayley(G), Q, rtol=1e-9, atol=1e-9)
    change = NBLoRA(r, sigma=sigma).update(None, {"A": G[:inp].T, "B": G[inp:], "sigma": torch.tensor([sigma]).double()})
    torch.testing.assert_close(change.up @ change.down, sigma * U * shares @ V.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("r", [1, 4])
def test_the_reach_of_nb_lora_is_the_largest_share_of_the_weight(W, r):
    made = placed(NBLoRA(r, reach=0.3), linear(W))
    assert made.method.bound(made.tensors()).item() == pytest.approx(0.3 * W.norm().item())
    with pytest.raises(ValueError, match="reach = 0.3: W is zero, so no change is a share of it; give sigma"):
        placed(NBLoRA(r, reach=0.3), linear(torch.zeros(10, 12)))
    assert placed(NBLoRA(r, sigma=2.0), linear(torch.zeros(10, 12))).tensors()["sigma"].item() == 2.0
    assert NBLoRA() == NBLoRA(reach=0.1)


def test_the_first_rung_is_ether_plus(W):
    ours, theirs = placed(Reflections(r=2, lam=2.0), linear(W)), placed(EtherPlus(two_sided=False), linear(W))
    u, v = torch.randn(2, 1, 12, dtype=torch.float64)
    for made, names in ((ours, "UV"), (theirs, "uv")):
        made.put(names[0], u)
        made.put(names[1], v)
    torch.testing.assert_close(ours.update().merge(W), theirs.update().merge(W), **EXACT)


def test_every_rung_starts_at_the_base_and_takes_a_step():
    assert list(RUNGS) == ["L0", "L1", "L2", "E0", "E1", "E2", "E3", "E4"]
    for name, rung in RUNGS.items():
        model = Holder(nn.Linear(20, 20))
        x = torch.randn(8, 20)
        before = model(x).detach()
        delora.inject(model, rung, ["layer"])
        torch.testing.assert_close(model(x), before)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(2):  # the first step of LoRA moves B alone
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        assert (model(x) - 1).square().mean() < (before - 1).square().mean(), name


@pytest.mark.parametrize("method", [ETHER(blocks=2), EtherPlus(blocks=2), OFT(blocks=2), HRA(r=2), IA3(side="input")], ids=str)
def test_multiplication_does_not_read_the_weight(method):
    """The layer runs; its weight is never touched, so a quantised one may stay as it is."""

    class Opaque(nn.Linear):
        """A linear layer that tells when its weight is read outside its own forward."""

        running = False
        reads = 0

        def __getattr__(self, name):
            if name == "weight" and not self.running:
                self.reads += 1
            return super().__getattr__(name)

        def forward(self, x):
            self.running = True
            y = super().forward(x)
            self.running = False
            return y

    class Known(delora.hosts.Linear):
        def __init__(self, layer):
            self.layer = layer

    delora.host.register(Opaque, Known)
    model = delora.inject(Holder(Opaque(12, 10)), method, ["layer"])
    model.layer.base.reads = 0
    model(torch.randn(3, 12)).sum().backward()
    assert model.layer.base.reads == 0


# ---------------------------------------------------------------- DoRA


@pytest.mark.parametrize("fixed", [False, True])
def test_the_rows_of_dora_have_the_norms_it_says(W, fixed):
    made = placed(DoRA(r=3, fixed_magnitude=fixed), linear(W))
    with torch.no_grad():
        for tensor in made.saved().values():
            tensor.add_(torch.rand_like(tensor))
    expected = W.norm(dim=1) if fixed else made.m.detach()
    torch.testing.assert_close(made.update().merge(W).norm(dim=1), expected, **EXACT)
    assert ("m" in made.tensors()) != fixed


def test_dora_never_builds_the_adapted_matrix():
    """No tensor as large as W is made in a forward and backward, but what the layer itself makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            fresh = isinstance(out, torch.Tensor) and not func.is_view
            if fresh:
                Largest.size = max(Largest.size, out.numel())
            return out

    model = delora.inject(Holder(nn.Linear(200, 150)), DoRA(r=2), ["layer"])
    with Largest():
        model(torch.randn(3, 200)).sum().backward()
    assert 0 < Largest.size < 150 * 200 / 10


def test_dropout_in_dora_spares_the_base_term():
    """With all but nothing kept, the base's own output is left."""
    model = delora.inject(Holder(nn.Linear(40, 30)), DoRA(r=4), ["layer"], dropout=1 - 1e-7).train()
    x = torch.randn(2, 40)
    shake(model)
    torch.testing.assert_close(model(x), model.layer.base(x))


# ---------------------------------------------------------------- biases, outputs, blocks


def test_a_layer_without_a_bias_gets_one_and_merges_into_one():
    model = delora.inject(nn.Sequential(nn.Linear(4, 3, bias=False), nn.LayerNorm(3)), BitFit(), ["0", "1"])
    shake(model)
    x = torch.randn(5, 4)
    before = model(x)
    shift = model[0].adapter.d.detach().clone()
    delora.merge(model)
    assert torch.equal(model[0].bias, shift)
    assert type(model[1]) is nn.LayerNorm
    torch.testing.assert_close(model(x), before)


def bert():
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    return BertModel(config).eval(), torch.randint(0, 30, (2, 7))


@pytest.mark.parametrize("method", [LoReFT(r=2), RED(), Bottleneck(size=2), BitFit(), IA3()], ids=str)
@pytest.mark.parametrize("place", ["attention", "output", "LayerNorm"])
def test_the_output_of_a_whole_block_can_be_edited(method, place, tmp_path):
    """An attention block puts out a tuple, a feed-forward block takes two tensors, a norm has a vector for a weight."""
    model, tokens = bert()
    before = model(tokens).last_hidden_state
    targets = rf"encoder\.layer\.\d\.{'output.LayerNorm' if place == 'LayerNorm' else place}"
    shake(delora.inject(model, method, targets))
    after = model(tokens).last_hidden_state
    assert not torch.allclose(after, before)
    delora.save(model, tmp_path)
    with delora.disabled(model):
        assert torch.equal(model(tokens).last_hidden_state, before)
    delora.strength(model, 0.0)
    assert torch.equal(model(tokens).last_hidden_state, before)
    delora.eject(model)
    torch.testing.assert_close(delora.load(model, tmp_path)(tokens).last_hidden_state, after)
    mergeable = place == "LayerNorm" and isinstance(method, (RED, BitFit, IA3))
    if mergeable:
        torch.testing.assert_close(delora.merge(model)(tokens).last_hidden_state, after)
    else:
        with pytest.raises(ValueError, match=r"cannot merge 'encoder\.layer\.0\..*': "):
            delora.merge(model)
        torch.testing.assert_close(model(tokens).last_hidden_state, after)


@pytest.mark.parametrize(("first", "last", "edited"), [(2, 0, [0, 1]), (0, 1, [6]), (1, 2, [0, 5, 6]), (9, 0, range(7))])
def test_loreft_edits_the_positions_it_names(first, last, edited):
    model = Holder(nn.Linear(8, 8))
    x = torch.randn(2, 7, 8)
    before = model(x)
    delora.inject(model, LoReFT(r=2, first=first, last=last), ["layer"])
    changed = (model(x) != before).all(dim=2)
    assert changed.any(dim=0).nonzero().flatten().tolist() == list(edited)
    with pytest.raises(ValueError, match=r"positions of an output \[batch, positions, channels\], got shape \[3, 8\]"):
        model(torch.randn(3, 8))


def test_the_rows_of_loreft_stay_orthonormal():
    model = shake(delora.inject(Holder(nn.Linear(8, 8).double()), LoReFT(r=3), ["layer"]), 3.0)
    x = torch.randn(5, 8, dtype=torch.float64)
    edit = model(x) - model.layer.base(x)
    R = model.layer.adapter.R.detach()
    q = slow.orthonormal_rows(R)
    p = model.layer.adapter
    # Within the span of R's rows the output is W h + b; orthogonal to it nothing changes.
    torch.testing.assert_close(model(x) @ q.T, model.layer.base(x) @ p.W.T + p.b)
    torch.testing.assert_close(edit - edit @ q.T @ q, torch.zeros_like(edit))


@pytest.mark.parametrize("method", [IA3(), RED()], ids=str)
def test_an_output_that_is_not_what_the_last_parameter_says(method):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.answer = lambda x: {"y": x}

        def forward(self, x):
            return self.answer(x)

    model = delora.inject(Holder(Odd()), method, ["layer"])
    with pytest.raises(ValueError, match=r"cannot edit the output of a Odd: expected a tensor with 4 channels .* got a dict"):
        model(torch.randn(2, 4))
    model.layer.base.answer = lambda x: x[:, :3]
    with pytest.raises(ValueError, match=r"got shape \[2, 3\]"):
        model(torch.randn(2, 4))
    with pytest.raises(TypeError, match="cannot adapt a ReLU: it has no parameter that tells its number of output channels"):
        delora.inject(Holder(nn.ReLU()), method, ["layer"])


# ---------------------------------------------------------------- export


LOW_RANK = [name for name, m in CASES.items() if placed(m, nn.Linear(8, 8)).low_rank() is not None]


def test_the_change_is_low_rank_of_the_additive_methods_and_the_reflections_alone():
    kinds = {type(CASES[name]) for name in LOW_RANK} & set(METHODS.values())
    assert kinds >= {LoRA, DeLoRA, NBLoRA, ETHER, EtherPlus, HRA, Reflections}
    assert not kinds & {DoRA, OFT, BitFit, IA3, RED, LoReFT, Bottleneck}


@pytest.mark.parametrize("name", LOW_RANK)
def test_whatever_is_low_rank_after_the_fact_is_exported_as_a_lora(name, tmp_path):
    from peft import PeftModel

    net = Net().eval()
    base = {key: t.clone() for key, t in net.state_dict().items()}
    shake(delora.inject(net, CASES[name], ["q", "v"]))
    delora.strength(net, 0.5)
    x = ids()
    expected = net(x)
    delora.export.peft(net, tmp_path)
    fresh = Net().eval()
    fresh.load_state_dict(base)
    torch.testing.assert_close(PeftModel.from_pretrained(fresh, tmp_path)(x), expected)


@pytest.mark.parametrize("name", [name for name in CASES if name not in LOW_RANK])
def test_the_rest_is_refused_and_merging_named_as_the_way_out(name, tmp_path):
    net = shake(delora.inject(Net(), CASES[name], ["q"]))
    words = f"q: {type(CASES[name]).__name__}.* is not a low-rank change"
    with pytest.raises(ValueError, match=words) as refusal:
        delora.export.peft(net, tmp_path / "out")
    assert ("delora.merge" in str(refusal.value)) == net.q.adapter.mergeable()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="cannot blend 'q': .* is not a low-rank change"):
        delora.blend(net, {"default": 1.0}, "b")


def test_low_rank_changes_of_different_methods_blend_exactly():
    net = shake(delora.inject(Net().double(), ETHER(blocks=2), ["q"], name="a"))
    shake(delora.inject(net, DeLoRA(r=2), ["q"], name="b"))
    W = net.q.placed("a").host.weight()
    changes = [net.q.placed(key).update().merge(W) - W for key in "ab"]
    delora.blend(net, {"a": 0.3, "b": 2.0}, "ab")
    torch.testing.assert_close(net.q.adapter.update().merge(W), W + 0.3 * changes[0] + 2 * changes[1])


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DoRA(r=0), "r = 0: the rank must be an integer of at least 1"),
        (lambda: DoRA(alpha=-1), "alpha = -1: must be a finite number above 0"),
        (lambda: DoRA(fixed_magnitude=1), "fixed_magnitude = 1: must be True or False"),
        (lambda: ETHER(blocks=0), "blocks = 0: it must be an integer of at least 1"),
        (lambda: ETHER(side="left"), "side = 'left': must be one of 'input', 'output'"),
        (lambda: EtherPlus(blocks=1.0), "blocks = 1.0: it must be an integer"),
        (lambda: EtherPlus(two_sided=None), "two_sided = None: must be True or False"),
        (lambda: OFT(blocks=-4), "blocks = -4"),
        (lambda: OFT(radius=0.0), "radius = 0.0: must be a finite number above 0"),
        (lambda: OFT(radius=math.nan), "radius = nan"),
        (lambda: HRA(r=3), "r = 3: the reflections cancel in pairs, so r must be even"),
        (lambda: HRA(r=0), "r = 0: the rank"),
        (lambda: NBLoRA(sigma=1.0, reach=0.1), "sigma = 1.0 and reach = 0.1: both say how large the change can be"),
        (lambda: NBLoRA(sigma=0.0), "sigma = 0.0: must be a finite number above 0"),
        (lambda: NBLoRA(reach=-0.1), "reach = -0.1: must be"),
        (lambda: Reflections(r=3), "r = 3: the terms cancel in pairs, so r must be even"),
        (lambda: Reflections(lam=math.inf), "lam = inf"),
        (lambda: IA3(side=None), "side = None"),
        (lambda: LoReFT(r=0), "the rank must be"),
        (lambda: LoReFT(first=-1), "first = -1: the number of positions, if not 0, must be an integer of at least 1"),
        (lambda: Bottleneck(size=0), "size = 0"),
        (lambda: Bottleneck(activation="swish"), "activation = 'swish': must be one of 'gelu', 'relu', 'silu', 'tanh'"),
        (lambda: Bottleneck(std=0.0), "std = 0.0"),
    ],
)
def test_bad_hyperparameters_are_refused_in_words(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (ETHER(blocks=5), r"q: blocks = 5 do not divide the input of size 8; \[1, 2, 4, 8\] do"),
        (ETHER(blocks=5, side="output"), "q: blocks = 5 do not divide the output of size 8"),
        (EtherPlus(blocks=8), r"v: blocks = 8 do not divide the output of size 12"),
        (OFT(blocks=8), "q: blocks = 8: blocks of size 1 cannot turn"),
        (LoReFT(r=9), r"q: r = 9 is more than an output of \[8\] can have, which is 8"),
        (Reflections(r=10), r"q: r = 10 is more than a matrix of shape \[8, 8\] can have"),
    ],
    ids=str,
)
def test_a_method_that_does_not_fit_a_layer_is_refused_before_anything_changes(method, words):
    net = Net()
    with pytest.raises(ValueError, match=words):
        delora.inject(net, method, ["q", "v"])
    assert type(net.q) is type(net.v) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())


def test_the_cases_hold_every_method():
    assert {type(method) for method in CASES.values()} | {Full} == {*METHODS.values(), VeRA}


def test_the_report_says_what_it_cannot_measure():
    net = shake(delora.inject(Net(), RED(), ["q"]))
    report = inspect(net)["q"]
    assert report.spectral is None
    assert report.distance > 0
    shake(delora.inject(net, LoReFT(), ["v"], name="edit"))
    assert inspect(net)["v"].distance is None
    assert delora.distances(net) == {}
    assert delora.diagnostics.Recorder(net).record() == {}
