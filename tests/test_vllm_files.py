"""What vLLM would refuse, or leave out without a word, is refused before a file is written; what is written is PEFT's file.

vLLM itself reads the files in `tests/vllm`, which needs an environment of its own: make test-vllm.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import delora
from delora import BitFit, DeLoRA, DoRA, LoRA
from delora.formats.peft import CONFIG, TENSORS
from tests.cases import shake
from tests.test_cli import run

SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
SIZES |= dict(num_key_value_heads=1, pad_token_id=0, bos_token_id=0, eos_token_id=1, max_position_embeddings=32)


def llama(kind="CausalLM", **options):
    torch.manual_seed(0)
    return getattr(transformers, f"LlamaFor{kind}")(transformers.LlamaConfig(**SIZES | options))


def seeing():
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=dict(SIZES, sliding_window=32), vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def mixture():
    options = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, decoder_sparse_step=1)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **options))


def latent():
    options = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1)
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes | options | {"num_key_value_heads": 2}))


def gpt():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16))


REFUSED = [
    (llama, LoRA(2), {"targets": ["q_proj"], "also_train": ["norm"]}, "model.norm is trained whole.*delora.merge"),
    (llama, LoRA(2), {"targets": ["q_proj"], "also_train": ["lm_head"]}, "lm_head is trained whole"),
    (lambda: llama("TokenClassification"), LoRA(2), {"targets": ["q_proj"], "also_train": ["score"]}, "score is trained whole"),
    (llama, DoRA(2), {"targets": ["q_proj"]}, "is not a low-rank change; delora.merge"),
    (lambda: llama(attention_bias=True), BitFit(), {"targets": ["q_proj"]}, "is not a low-rank change"),
    (gpt, LoRA(2), {"targets": ["c_attn"]}, "c_attn is a Conv1D, and vLLM adapts linear layers and embeddings"),
    (seeing, LoRA(2), {"targets": r".*vision_tower.*_proj"}, r"outside of the language model \(model.language_model.\*\)"),
    (mixture, LoRA(2), {"targets": ["gate_up_proj"]}, "experts.gate_up_proj.0 is a matrix in a parameter of a Qwen3MoeExperts"),
    (latent, LoRA(2), {"targets": ["kv_b_proj"]}, "kv_b_proj is read once by vLLM's attention"),
    (lambda: nn.Sequential(nn.Linear(4, 4)), LoRA(2), {"targets": ["0"]}, "models of transformers, which a Sequential is not"),
]


@pytest.mark.parametrize(("make", "method", "options", "words"), REFUSED, ids=[words[:40] for *_, words in REFUSED])
def test_what_vllm_does_not_read_right_is_refused_before_a_file_is_written(make, method, options, words, tmp_path):
    model = delora.inject(make(), method, **options)
    with pytest.raises(ValueError, match=words):
        delora.export.vllm(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (DeLoRA(16), {}, "q_proj has rank 32, and vLLM is started for 16 .*--max-lora-rank 32 .*max_lora_rank=32.* rank=16"),
        (DeLoRA(5), {"max_lora_rank": 8}, "has rank 10, .*--max-lora-rank 16"),
        (DeLoRA(5), {"max_lora_rank": 8, "rank": 9}, "has rank 10, .*--max-lora-rank 16"),
        (LoRA(2), {"max_lora_rank": 24}, "max_lora_rank = 24: vLLM can be started with one of 1, 8, 16, 32"),
    ],
)
def test_a_rank_that_vllm_is_not_started_for_is_refused_with_what_to_do(method, options, words, tmp_path):
    model = delora.inject(llama(), method, ["q_proj"])
    with pytest.raises(ValueError, match=words):
        delora.export.vllm(model, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("make", "method", "options", "form"),
    [
        (llama, DeLoRA(8), {"targets": "all-linear"}, {}),
        (llama, DeLoRA(16), {"targets": "all-linear"}, {"max_lora_rank": 32}),
        (llama, DeLoRA(16), {"targets": "all-linear"}, {"rank": 16}),
        (llama, LoRA(2), {"targets": ["embed_tokens", "lm_head"]}, {"dtype": torch.bfloat16}),
        (lambda: llama("SequenceClassification"), LoRA(2), {"targets": ["q_proj"], "also_train": ["score"]}, {}),
        (seeing, LoRA(2), {"targets": r".*language_model.*_proj|lm_head"}, {}),
    ],
)
def test_what_is_written_is_pefts_file(make, method, options, form, tmp_path):
    model = shake(delora.inject(make(), method, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        delora.export.vllm(model, tmp_path / "vllm", **form)
        delora.export.peft(model, tmp_path / "peft", **{key: value for key, value in form.items() if key != "max_lora_rank"})
    one, other = tmp_path / "peft", tmp_path / "vllm"
    assert (one / CONFIG).read_text() == (other / CONFIG).read_text()
    first, second = load_file(one / TENSORS), load_file(other / TENSORS)
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[key]) for key, t in first.items())


def test_the_command_line_says_how_to_serve(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    delora.save(delora.inject(llama(), DeLoRA(16), ["q_proj"]), tmp_path / "mine")
    options = ("--kind", "vllm", "--model", tmp_path / "base", "--out", tmp_path / "out")
    code, _, words = run("export", tmp_path / "mine", *options)
    assert code == 1
    assert "--max-lora-rank 32" in " ".join(words.split())
    code, said, _ = run("export", tmp_path / "mine", *options, "--max-lora-rank", 32)
    assert code == 0
    assert f"vllmserve{tmp_path / 'base'}--enable-lora--max-lora-rank32--lora-modulesout={tmp_path / 'out'}" in "".join(
        said.split()
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 32
    code, _, words = run("export", tmp_path / "mine", *options[2:4], "--out", tmp_path / "other", "--max-lora-rank", 32)
    assert code == 2
    assert "--max-lora-rank is for --kind vllm" in " ".join(words.split())
