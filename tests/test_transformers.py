"""Real architectures of the transformers library, tiny and with random weights: they peek, tie, generate and reload."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import delora
from delora import DeLoRA, LoRA
from delora.models import adapted_layers
from tests.cases import shake

TOKENS = dict(vocab_size=50, bos_token_id=0, eos_token_id=1, pad_token_id=2)


def bert():
    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    ).eval()


def llama():
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(**sizes, **TOKENS)).eval()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, **TOKENS)).eval()


def t5():
    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, **TOKENS)
    return T5ForConditionalGeneration(config).eval()


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2, "t5": t5}


def tokens():
    return torch.randint(3, 50, (2, 6))


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_is_every_linear_layer_but_the_head(name):
    model = delora.inject(MODELS[name](), DeLoRA(r=2), "all-linear")
    found = set(adapted_layers(model))
    kinds = {n for n, m in MODELS[name]().named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert found == kinds - {"classifier", "lm_head"}
    assert len(found) >= 8


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_runs_and_the_start_is_the_base(name):
    model, x = MODELS[name](), tokens()
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=2)
    before = model.generate(x, **options)
    delora.inject(model, DeLoRA(r=2, start="soft"), "all-linear")
    assert torch.equal(model.generate(x, **options), before)
    assert model.config.vocab_size == 50
    after = shake(model, 3.0).generate(x, **options)
    with delora.merged(model):
        assert torch.equal(model.generate(x, **options), after)


def test_models_that_peek_at_a_layer_see_its_base():
    """T5 reads wo.weight.dtype to decide on a cast; others read in_features or bias."""
    model = t5()
    delora.inject(model, LoRA(r=2), ["wo", "q"])
    layer = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert layer.weight is layer.base.weight
    assert (layer.in_features, layer.out_features, layer.bias) == (32, 16, None)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing
    x = tokens()
    model(input_ids=x, labels=x).loss.backward()


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_saves_and_reloads_by_its_own_library(name, tmp_path):
    model, x = MODELS[name](), tokens()
    shake(delora.inject(model, DeLoRA(r=2), "all-linear"))
    inputs = {"input_ids": x, "decoder_input_ids": x} if name == "t5" else {"input_ids": x}
    before = model(**inputs).logits
    kinds = {n: type(m) for n, m in MODELS[name]().named_modules()}
    delora.merge(model)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(**inputs).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_librarys_gradient_checkpointing_changes_nothing(name):
    model, x = MODELS[name](), tokens()
    shake(delora.inject(model, DeLoRA(r=2), "all-linear", dropout=0.2)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    labels = torch.tensor([0, 1]) if name == "bert" else x

    def gradients():
        torch.manual_seed(3)
        model.zero_grad()
        model(input_ids=x, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable()
    again = gradients()
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient)


def test_a_pretrained_checkpoint_loads_into_an_injected_model():
    model, source = bert(), bert()
    shake(delora.inject(model, DeLoRA(r=2), ["query", "value"], also_train=["classifier"]))
    model.load_state_dict(source.state_dict())
    x = tokens()
    with delora.disabled(model):
        assert torch.equal(model(x).logits, source(x).logits)
    assert not torch.allclose(model(x).logits, source(x).logits)


def test_the_readme_example_in_small(tmp_path):
    model = bert()
    base = copy.deepcopy(model)
    delora.inject(model, DeLoRA(r=2, reach=0.1), targets=["query", "value"], dropout=0.2, also_train=["classifier"])
    model.train()
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=3e-2, head_lr=1e-2, weight_decay=0.01))
    x, labels = tokens(), torch.tensor([0, 1])
    losses = []
    for _ in range(30):
        loss = model(x, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    delora.save(model, tmp_path)
    assert torch.equal(delora.load(base, tmp_path)(x).logits, model(x).logits)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_save_pretrained_writes_with_adapters_in_a_model_loads_as_no_other_model(name, tmp_path):
    model, source, x = MODELS[name](), MODELS[name](), tokens()
    source.load_state_dict(model.state_dict())
    shake(delora.inject(model, DeLoRA(r=2), "all-linear"))
    changed = model(x).logits
    for part, folder in ((model, tmp_path / "a"), (model.base_model, tmp_path / "inner")):
        with pytest.warns(UserWarning, match="a Trainer goes on from it and delora.load reads its adapter"):
            part.save_pretrained(folder)
        for kind in (type(part), transformers.AutoModel):
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                kind.from_pretrained(folder)
    torch.testing.assert_close(delora.load(source, tmp_path / "a")(x).logits, changed)
    twin = copy.deepcopy(model)
    twin.load_state_dict(load_file(tmp_path / "a" / "model.safetensors"), strict=False)  # as a Trainer does
    torch.testing.assert_close(twin(x).logits, changed)
    assert twin.__dict__["save_pretrained"].model is twin

    with delora.merged(model):
        model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(x).logits, changed, rtol=1e-4, atol=1e-5)
    delora.eject(model)
    assert "save_pretrained" not in model.__dict__
    model.save_pretrained(tmp_path / "plain")
    type(model).from_pretrained(tmp_path / "plain")
