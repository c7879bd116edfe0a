"""1f, 1s. Weights that several layers share, through merging, saving, loading, tying again and training whole."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import delora
from delora import DeLoRA
from tests.cases import shake

SMALL = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def make(kind: str):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL, **LLAMA, tie_word_embeddings=True)).eval()
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=16, n_layer=1, n_head=2)).eval()
    if kind == "bert":
        config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return BertForMaskedLM(BertConfig(**SMALL, **config)).eval()
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(**SMALL, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ).eval()
    sizes = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 1), ("ffn_dim", 16), ("attention_heads", 2))
    }
    return BartForConditionalGeneration(BartConfig(**SMALL, d_model=16, **sizes, decoder_start_token_id=2)).eval()


def call(model):
    ids = torch.arange(3, 9)[None]
    return model(input_ids=ids, **({"labels": ids} if model.config.is_encoder_decoder else {})).logits


TARGETS = {
    "llama": ["lm_head", "embed_tokens", "q_proj"],
    "gpt2": ["lm_head", "wte", "c_attn"],
    "bert": ["decoder", "word_embeddings", "query"],
    "t5": ["lm_head", "shared", "q"],
    "bart": ["lm_head", "fc1", "q_proj"],  # its embeddings have a forward of their own
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["head", "embedding", "neither"])
def test_merged_and_saved_reloads_to_the_merged_outputs_or_is_refused_before_anything_changes(kind, which, tmp_path):
    model = make(kind)
    shake(delora.inject(model, DeLoRA(r=2), [TARGETS[kind][which]]), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        changed = call(model)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    if (kind, which) in {("t5", 0), ("t5", 1), ("bart", 0), ("bert", 0), ("bert", 1)}:  # more than one pair is tied there
        with pytest.raises(ValueError, match="cannot merge .*(ties them again when it is loaded|did not run)"):
            delora.merge(model)
        assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
        torch.testing.assert_close(call(model), changed)
        return
    delora.merge(model)
    torch.testing.assert_close(call(model), changed, atol=1e-5, rtol=1e-4)
    model.tie_weights()
    torch.testing.assert_close(call(model), changed, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(call(again), changed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("which", [0, 1], ids=["head", "embedding"])
def test_tying_again_changes_nothing(kind, which):
    model = make(kind)
    shake(delora.inject(model, DeLoRA(r=2), [TARGETS[kind][which], TARGETS[kind][2]]), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        changed = call(model)
    names = [name for name, _ in model.named_parameters()]
    model.tie_weights()
    torch.testing.assert_close(call(model), changed)
    assert [name for name, _ in model.named_parameters()] == names
    delora.eject(model)
    model.tie_weights()
    torch.testing.assert_close(call(model), call(make(kind)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_tied_embedding_that_trains_whole_trains_as_one_weight(kind, tmp_path):
    model, names = make(kind), TARGETS[kind]
    before = call(model)
    with pytest.warns(
        UserWarning, match=f"{names[1]}, trained whole, shares its weight with .*{names[0]}: both are trained as one weight"
    ):
        delora.inject(model, DeLoRA(r=2), [names[2]], also_train=[names[1]])
    torch.testing.assert_close(call(model), before)
    shake(model, 0.1)
    changed = call(model)
    model.tie_weights()
    torch.testing.assert_close(call(model), changed)
    whole = [placed for placed in delora.models.adapters(model).values() if placed.whole]
    weights = {id(placed.adapter.module.weight) for placed in whole}
    assert len(whole) == 2
    assert len(weights) == 1
    with delora.disabled(model):
        torch.testing.assert_close(call(model), before)
    delora.save(model, tmp_path / "adapter")
    again = delora.load(make(kind), tmp_path / "adapter")
    torch.testing.assert_close(call(again), changed)
    assert len({id(p.adapter.module.weight) for p in delora.models.adapters(again).values() if p.whole}) == 1
    if kind == "bert":  # whose head has a bias that is tied as well, to one outside of the head
        with pytest.raises(
            ValueError, match="'cls.predictions.decoder.bias': the same weight is that of 'cls.predictions.bias'"
        ):
            delora.merge(model)
        return
    delora.merge(model)
    torch.testing.assert_close(call(model), changed)
    model.tie_weights()
    torch.testing.assert_close(call(model), changed)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(call(type(model).from_pretrained(tmp_path / "merged").eval()), changed)


def test_one_weight_cannot_have_an_adapter_here_and_train_whole_there():
    with pytest.raises(
        ValueError, match="lm_head, a target, shares its weight with model.embed_tokens, which is trained whole"
    ):
        delora.inject(make("llama"), DeLoRA(r=2), ["lm_head"], also_train=["embed_tokens"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*a model with adapters is written")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_plain_trainer_saves_and_resumes_a_tied_model_whose_head_is_a_target(kind, tmp_path):
    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)} for _ in range(4)]
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 1, "logging_strategy": "no"}

    def trainer(steps):
        torch.manual_seed(1)
        model = delora.inject(make(kind), DeLoRA(r=2), [TARGETS[kind][0], TARGETS[kind][2]])
        return Trainer(model, TrainingArguments(str(tmp_path), max_steps=steps, **options), train_dataset=rows)

    first = trainer(2)
    first.train()
    second = trainer(3)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.state.global_step == 3
    twin = copy.deepcopy(first.model)
    assert call(twin).isfinite().all()
