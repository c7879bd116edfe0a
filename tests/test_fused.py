"""Whose the rows of fused layers are: what is known of a class is what its attention computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import delora
from delora import LoRA
from delora.hosts import Slot, host
from delora.models import adapters, places, walk
from tests.cases import shake
from tests.zoo.build import build, lively

IDS = torch.arange(1, 13)[None]
SIZES = {"vocab_size": 20, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 24}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHORT = {"vocab_size": 20, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}


def causal(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **sizes))


TEXTS = {
    "phi3": causal("phi3", num_key_value_heads=2, **SIZES),
    "gpt2": causal("gpt2", **SHORT),
    "bloom": causal("bloom", vocab_size=20, hidden_size=32, n_layer=1, n_head=4),
    "falcon, per head": causal("falcon", new_decoder_architecture=False, multi_query=False, **SIZES),
    "falcon, one key": causal("falcon", new_decoder_architecture=False, multi_query=True, **SIZES),
    "falcon, grouped": causal("falcon", new_decoder_architecture=True, num_kv_heads=2, **SIZES),
    "gpt_neox": causal("gpt_neox", **SIZES),
    "codegen": causal("codegen", rotary_dim=4, n_ctx=32, **SHORT),
    "gpt_bigcode, one key": causal("gpt_bigcode", multi_query=True, **SHORT),
    "gpt_bigcode, per head": causal("gpt_bigcode", multi_query=False, **SHORT),
    "mpt": causal("mpt", vocab_size=20, d_model=32, n_heads=4, n_layers=1, max_seq_len=32),
    "persimmon": causal("persimmon", **SIZES),
    "openai-gpt": causal("openai-gpt", **{k: n for k, n in SHORT.items() if "token" not in k}),
    "dbrx": causal(
        "dbrx",
        **{"vocab_size": 20, "d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 32},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 1e4},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 32},
    ),
    "glm": causal("glm", num_key_value_heads=2, head_dim=8, **SIZES),
    "granitemoeshared": causal(
        "granitemoeshared",
        **{"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 24, **SIZES},
    ),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2, reference_compile=False)
    ),
}
# timm's plain attention, one in windows, one whose parent reads the weight of the layer; and transformers' own.
PICTURES = ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224", "timm:eva02_tiny_patch14_224"]
PICTURES += ["vitdet", "qwen2_vl"]


def fused_layers(model: nn.Module) -> dict[str, dict[str, Slot]]:
    """The slices of the fused layers of a model, by the layer's name."""
    found: dict[str, dict[str, Slot]] = {}
    for name, place in places(model).items():
        if isinstance(place, Slot) and not place.key:
            found.setdefault(name.removesuffix(f".{place.cut}"), {})[place.cut] = place
    return found


class Call:
    """One call of the module around a fused layer, to be run again with other rows."""

    def __init__(self, model: nn.Module, layer: str, run: Callable[[], Any]) -> None:
        self.module = dict(walk(model)).get(layer.rpartition(".")[0], model)
        self.layer = dict(walk(model))[layer]
        calls: list[Any] = []
        hook = self.module.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
        run()
        hook.remove()
        self.args, self.kwargs = calls[0] if calls else ((), {})
        self.ran = bool(calls)

    def __call__(self, edit: Callable[[Tensor], Tensor] = lambda y: y) -> Tensor:
        """The output, where ``edit`` changes that of the fused layer."""
        hook = self.layer.register_forward_hook(lambda _, args, y: edit(y))
        y = self.module(*self.args, **self.kwargs)
        hook.remove()
        return y[0] if isinstance(y, (tuple, list)) else y

    def times(self, **factors: float) -> Tensor:
        """The output with the rows of slices multiplied."""
        kept = {key: p.detach().clone() for key, p in self.layer.named_parameters()}
        W, b = host(self.layer).matrix(), self.layer.bias
        for cut, factor in factors.items():
            rows = self.slots[cut].fused.rows(cut)
            W[rows] *= factor
            if b is not None:
                b[rows] *= factor
        y = self()
        for key, p in self.layer.named_parameters():
            p.copy_(kept[key])
        return y

    slots: dict[str, Slot]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, b.abs().max().item()))


def linear(call: Call, cut: str) -> bool:
    base = call()
    return close(call.times(**{cut: 2.0}) - base, base - call.times(**{cut: 0.0}))


@torch.no_grad()
def check(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """The layers that were seen to be divided as is known; anything else is an AssertionError."""
    right = []
    for layer, slots in fused_layers(model).items():
        call = Call(model, layer, run)
        if not call.ran:
            continue
        call.slots, base = slots, call()
        if set(slots) == {"gate", "up"}:
            assert linear(call, "up"), f"{layer}: the output is not linear in up"
            assert not linear(call, "gate"), f"{layer}: the output is linear in the gate"
        else:
            if "q" in slots:
                assert close(call.times(q=2.0, k=0.5), base), f"{layer}: q and k do not go together"
                assert not close(call.times(q=0.0), base), f"{layer}: q changes nothing"
            assert linear(call, "v"), f"{layer}: the output is not linear in v"
            assert not linear(call, "k"), f"{layer}: the output is linear in k"
        right.append(layer)
    return right


def others_change(model: nn.Module, run: Callable[[], Any]) -> dict[str, bool]:
    """Of the first fused attention, whether a slice at the second token acts on what later tokens get."""
    layer, slots = next((layer, slots) for layer, slots in fused_layers(model).items() if "q" in slots)
    call = Call(model, layer, run)
    base = call()

    def acts(cut: str) -> bool:
        def edit(y: Tensor) -> Tensor:
            y = y.clone()
            y[:, 1, slots[cut].fused.rows(cut)] += torch.randn(slots[cut].fused.count(cut))
            return y

        changed = call(edit)
        assert not close(changed[:, 1], base[:, 1])
        return not close(changed[:, 2:], base[:, 2:])

    return {cut: acts(cut) for cut in slots}


def text(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = TEXTS[name]().eval()
    for key, p in model.named_parameters():
        if p.ndim > 1 or key.endswith("bias"):
            nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_known_of_language_models(name):
    model = text(name)
    run = lambda: model(IDS, **({} if name in ("modernbert", "openai-gpt") else {"use_cache": False}))  # noqa: E731
    assert check(model, run)
    if any("q" in slots for slots in fused_layers(model).values()):
        with torch.no_grad():
            assert others_change(model, run) == {"q": False, "k": True, "v": True}


@pytest.mark.parametrize("name", PICTURES)
def test_what_is_known_of_vision_models(name):
    found = build(name)
    model = lively(found.model).eval()
    for key, p in model.named_parameters():  # of timm's Eva: not in the layer
        if key.endswith(("q_bias", "v_bias")):
            p.requires_grad_(False).zero_()
    assert check(model, lambda: model(**found.inputs))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize("name", ["phi3", "bloom", "falcon, grouped", "gpt2"])
def test_slices_of_a_real_model_are_saved_exported_and_merged(name, tmp_path):
    import peft

    base = text(name)
    layer = next(layer for layer, slots in fused_layers(base).items() if "q" in slots)
    model = delora.inject(text(name), delora.DeLoRA(r=2), {layer: ["q", "v"]})
    assert list(adapters(model)) == [f"{layer}.q", f"{layer}.v"]
    with torch.no_grad():
        expected = shake(model)(IDS).logits
        assert not close(expected, base(IDS).logits)
        delora.save(model, tmp_path / "adapter")
        assert torch.equal(delora.load(text(name), tmp_path / "adapter")(IDS).logits, expected)
        delora.export.peft(model, tmp_path / "peft")
        assert close(peft.PeftModel.from_pretrained(text(name), tmp_path / "peft").eval()(IDS).logits, expected)
        assert close(delora.merge(model)(IDS).logits, expected)


def test_sizes_that_do_not_fit_are_not_taken():
    """A model whose attention tells other sizes than its weight has."""
    model = text("phi3")
    attention = model.model.layers[0].self_attn
    attention.num_key_value_heads = 1
    assert not any(layer.endswith("qkv_proj") for layer in fused_layers(model))
    with pytest.raises(ValueError, match="of the 64 rows of the qkv_proj of a Phi3Attention, what is known does not fit"):
        delora.inject(model, LoRA(r=2), {"qkv_proj": ["q"]})
