"""Mixtures of experts: how they are named, what all-linear takes, and what PEFT reads."""

from __future__ import annotations

import contextlib
import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import delora
from delora import DeLoRA, LoRA
from delora.factored import Factored
from delora.models import adapters
from tests.cases import shake

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 12, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, moe_intermediate_size=12, head_dim=8, **SIZES)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(num_local_experts=4, head_dim=8, **SIZES)),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(num_local_experts=4, head_dim=8, intermediate_size_mlp=16, moe_layers=[0], **SIZES)
    ),
}
TOKENS = torch.arange(1, 13)[None]


@pytest.fixture(params=MODELS, ids=str)
def base(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for name, p in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(p, std=0.2)
    return model.eval()


@torch.no_grad()
def out(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def inject(model: nn.Module, method: object, targets: object = "all-linear", **more: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return delora.inject(model, method, targets, **more)


def test_all_linear_takes_every_expert_and_names_the_router(base):
    before = out(base)
    with pytest.warns(UserWarning, match="left out") as told:
        model = delora.inject(base, DeLoRA(r=2), "all-linear")
    torch.testing.assert_close(out(model), before, atol=1e-5, rtol=1e-4)
    names = [name for name in adapters(model) if ".experts." in name]
    assert sorted(names) == sorted(
        f"{name}.{key}.{i}"
        for name, _ in base.named_modules()
        if name.endswith(".experts")
        for key in ("gate_up_proj", "down_proj")
        for i in range(4)
    )
    (words,) = {str(w.message) for w in told}
    assert "Router" in words
    assert words in str(delora.summary(model))


def test_a_linear_router_is_named_too():
    config = {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 20, "max_seq_len": 32}
    config |= {
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "hidden_size": 16},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    }
    model = DbrxForCausalLM(DbrxConfig(**config)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    before = out(model)
    with pytest.warns(UserWarning, match=r"1 Linear .*it chooses among 4 experts\), such as '.*router.layer'"):
        delora.inject(model, DeLoRA(r=2), "all-linear")
    after = out(shake(model, 0.05))
    assert not torch.allclose(after, before, atol=1e-3)
    assert sum(".w2." in name for name in adapters(model)) == 4
    with pytest.raises(ValueError, match="PEFT cannot adapt"):
        delora.export.peft(model, "never")
    torch.testing.assert_close(out(delora.merge(model)), after, atol=1e-4, rtol=1e-4)


def test_targets_exclude_and_overrides_reach_parameters_and_single_experts(base):
    model = inject(
        base,
        DeLoRA(r=2),
        ["experts.gate_up_proj", "down_proj.1"],
        exclude=["gate_up_proj.0"],
        overrides={r"gate_up_proj\.3$": {"r": 4}},
    )
    chosen = {name.partition("experts.")[2]: a.method.r for name, a in adapters(model).items()}
    assert chosen == {"gate_up_proj.1": 2, "gate_up_proj.2": 2, "gate_up_proj.3": 4, "down_proj.1": 2}
    before = out(model)
    shake(model)
    assert not torch.allclose(out(model), before)
    regex = inject(delora.eject(model), DeLoRA(r=2), r".*experts\.down_proj\.[01]")
    assert [name[-1] for name in adapters(regex)] == ["0", "1"]
    with pytest.raises(ValueError, match=r"no module ends with 'experts.gate_up_projs'.*did you mean '.*experts.gate_up_proj'"):
        delora.inject(delora.eject(model), DeLoRA(r=2), ["experts.gate_up_projs"])


def test_only_the_experts_that_a_batch_reaches_get_a_gradient(base):
    model = inject(base, DeLoRA(r=2, start="soft"), ["experts.gate_up_proj"])
    shake(model)
    model(TOKENS).logits.square().sum().backward()
    grads = {name: a.A.grad for name, a in adapters(model).items()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert sum(bool(g.any()) for g in grads.values()) >= 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT looks for them among modules; it uses them
def test_peft_reads_what_is_exported(base, tmp_path):
    """With single experts left out and ranks that differ."""
    model = inject(
        copy.deepcopy(base), DeLoRA(r=2), "all-linear", exclude=["down_proj.2"], overrides={r"gate_up_proj\.1$": {"r": 3}}
    )
    adapted = out(shake(model, 0.1))
    delora.export.peft(model, tmp_path)
    torch.testing.assert_close(out(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()), adapted)
    assert not torch.allclose(out(base), adapted, atol=1e-3)


def test_saved_merged_and_reloaded(base, tmp_path):
    model = inject(copy.deepcopy(base), LoRA(r=2), "all-linear")
    adapted = out(shake(model, 0.1))
    delora.save(model, tmp_path / "adapter")
    assert torch.equal(out(delora.load(copy.deepcopy(base), tmp_path / "adapter")), adapted)
    with delora.merged(model):
        model.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(out(again), adapted, atol=1e-4, rtol=1e-4)
    other = copy.deepcopy(base)
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if name.endswith("experts.down_proj"))[2].mul_(1.5)
    with pytest.raises(delora.AdapterError, match=r"the weights of .*experts.down_proj.2 are not those"):
        delora.load(other, tmp_path / "adapter")


def test_parameters_of_three_dimensions_that_nobody_knows_are_named():
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(3, 4, 4)), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.einsum("bi,eji->bj", x, self.w))

    model = nn.Sequential(Bank())
    with pytest.warns(UserWarning, match=r"1 Bank .*a Bank keeps its weights itself\), such as '0'"):
        delora.inject(model, DeLoRA(r=2), "all-linear")
    assert list(adapters(model)) == ["0.out"]
    with pytest.raises(ValueError, match="no module ends with 'w'"):
        delora.inject(delora.eject(model), DeLoRA(r=2), ["w"])


def test_a_suffix_that_layers_have_is_theirs_alone():
    """`down_proj` of a dense or shared layer beside experts: half of the experts' matrices would be no one's wish."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.down_proj = MODELS["mixtral"]().model.layers[0].mlp, nn.Linear(8, 8)

    model = Block()
    delora.inject(model, DeLoRA(r=2), ["down_proj"])
    assert list(adapters(model)) == ["down_proj"]
    delora.inject(model, DeLoRA(r=2), ["experts.down_proj"], name="experts")
    assert "mlp.experts.down_proj.0" in adapters(model, "experts")


# ---------------------------------------------------------------- factors beside the frozen weights

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
METHODS = {"LoRA": LoRA(r=2), "DeLoRA": DeLoRA(r=2), "soft": DeLoRA(r=2, start="soft")}


def implemented(model: nn.Module, implementation: str) -> nn.Module:
    if implementation != getattr(model.config, "_experts_implementation", "eager"):
        with contextlib.suppress(ValueError):  # Llama-4 has only one
            model.set_experts_implementation(implementation)
    return model


def gradients(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    y = model(TOKENS).logits
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_factors_beside_the_weights_compute_what_changed_weights_do(base, implementation, method, monkeypatch):
    """With experts left out, ranks that differ, and a slice; and no changed weights are ever made."""
    model = implemented(base, implementation)
    targets = r".*experts\.(gate_up_proj\.[013]|gate_up_proj\.2\.up|down_proj\.[023])"
    shake(inject(model, method, targets, overrides={r"gate_up_proj\.1$": {"r": 3}}), 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(delora.parts, "_weight", lambda *_: pytest.fail("changed weights were made"))
        y, beside = gradients(model)
    monkeypatch.setattr(delora.parts, "_can_factor", lambda *_: False)
    expected, changed = gradients(model)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    for a, b in zip(beside, changed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_expert_has_a_gradient_whatever_the_batch_reaches(base, implementation):
    model = shake(inject(implemented(base, implementation), LoRA(r=2), ["experts.gate_up_proj", "experts.down_proj"]))
    model(TOKENS[:, :1]).logits.square().sum().backward()  # one token, two of four experts
    grads = {name: a.B.grad for name, a in adapters(model).items()}
    assert all(g is not None for g in grads.values())
    assert any(not g.any() for g in grads.values())
    assert any(g.any() for g in grads.values())


def test_a_change_that_is_not_low_rank_is_in_the_weights(base):
    model = shake(inject(base, delora.DoRA(r=2), ["experts.down_proj"]), 0.1)
    before = out(model)
    torch.testing.assert_close(out(delora.merge(model)), before, atol=1e-4, rtol=1e-4)


def factored() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A parameter with factors beside it, what it stands for, and the factors; one expert has none."""
    W = torch.randn(3, 4, 8)
    pairs = [(torch.randn(4, 2, requires_grad=True), torch.randn(2, 8, requires_grad=True)) for _ in range(2)]
    dense = torch.stack([W[0] + pairs[0][0] @ pairs[0][1], W[1], W[2] + pairs[1][0] @ pairs[1][1]])
    changed = Factored.beside(W, [pairs[0], None, pairs[1]], lambda: dense)
    return changed, dense, [t for pair in pairs for t in pair]


USES = {
    "rows times one": lambda W: torch.ones(5, 4) @ W[0],
    "one vector": lambda W: torch.ones(4) @ W[2],
    "by a tensor's number": lambda W: torch.ones(5, 4) @ W[torch.tensor(2)],
    "from the other side": lambda W: W[0] @ torch.ones(8, 2),
    "linear": lambda W: F.linear(torch.ones(5, 8), W[0], torch.ones(4)),
    "linear, transposed": lambda W: F.linear(torch.ones(5, 4), W[0].T),
    "no change": lambda W: torch.ones(5, 4) @ W[1],
    "batched": lambda W: torch.bmm(torch.ones(3, 5, 4), W),
    "batched, from the other side": lambda W: torch.bmm(W.transpose(1, 2), torch.ones(3, 4, 2)),
    "some experts": lambda W: torch.bmm(torch.ones(4, 1, 4), W[torch.tensor([0, 2, 1, 0])]),
    "grouped": lambda W: F.grouped_mm(torch.ones(8, 4), W, offs=torch.tensor([3, 5, 8], dtype=torch.int32)),
    "grouped, transposed": lambda W: F.grouped_mm(torch.ones(8, 8), W.mT, offs=torch.tensor([3, 3, 8], dtype=torch.int32)),
    "as a number": lambda W: (2 * W).sum(-1) + W.square().mean(),
    "a sum of one": lambda W: W[2].sum() + W[2].T.sum(),
    "in blocks": lambda W: torch.cat([part.squeeze(0) for part in W.chunk(3)]),
    "another order of dimensions": lambda W: W.transpose(0, 1).flatten(),
    "by a mask": lambda W: W[torch.tensor([True, False, True])],
    "with einsum": lambda W: torch.einsum("eij,tj->eti", W, torch.ones(5, 8)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_whatever_is_computed_with_the_parameter_is_computed_with_the_changed_one(use):
    torch.manual_seed(0)
    W, dense, factors = factored()
    y, expected = use(W), use(dense)
    torch.testing.assert_close(y, expected)
    got = torch.autograd.grad(y.sin().sum(), factors, allow_unused=True) if y.requires_grad else [None] * len(factors)
    torch.manual_seed(0)
    _, dense, factors = factored()
    wanted = torch.autograd.grad(use(dense).sin().sum(), factors, materialize_grads=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-4, atol=1e-5)
