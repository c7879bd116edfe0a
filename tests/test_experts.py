"""Mixtures of experts: how they are named, what all-linear takes, and what PEFT reads."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
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
