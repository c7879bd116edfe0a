"""What vLLM would refuse, or leave out without a word, is refused before a file is written; what is written is PEFT's file.

vLLM itself reads the files in `tests/vllm`, which needs an environment of its own: make test-vllm.
"""

from __future__ import annotations

import json
import re
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


def joint():
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1))


def unnamed():
    options = dict(num_local_experts=2, intermediate_size_mlp=16, moe_layers=[0])
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SIZES, **options))


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
    (mixture, DoRA(2), {"targets": ["experts.gate_up_proj"]}, "experts.gate_up_proj.0 has a DoRA.*not a low-rank change"),
    (mixture, LoRA(2), {"targets": ["q_proj"], "also_train": ["norm"]}, "model.norm is trained whole"),
    (joint, LoRA(2), {"targets": ["experts.down_proj"]}, "takes the adapters of gate_up_proj and down_proj of .* together"),
    (unnamed, LoRA(2), {"targets": ["experts.down_proj"]}, "not known how checkpoints of a Llama4ForCausalLM name"),
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


# ---------------------------------------------------------------- experts


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=1))


def olmoe():
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, num_experts=3, num_experts_per_tok=1))


def weights(model, folder):
    """The weights as the checkpoint has them that transformers writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


NAMED = {
    "qwen3_moe": (mixture, r"model\.layers\.0\.mlp\.experts\.\d\.(gate|up|down)_proj"),
    "mixtral": (mixtral, r"model\.layers\.0\.block_sparse_moe\.experts\.\d\.w[123]"),
    "olmoe": (olmoe, r"model\.layers\.0\.mlp\.experts\.\d\.(gate|up|down)_proj"),
    "deepseek_v3": (lambda: deep(), r"model\.layers\.0\.mlp\.experts\.\d\.(gate|up|down)_proj"),
}


def deep():
    options = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=0)
    options |= dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1, moe_intermediate_size=16)
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes | options | {"num_key_value_heads": 2}))


@pytest.mark.parametrize(("make", "names"), NAMED.values(), ids=NAMED)
def test_each_expert_is_named_as_its_weight_in_checkpoints_and_changes_it_exactly(make, names, tmp_path):
    """transformers itself writes the weights of each expert, before and after the change is merged."""
    model = make().eval()
    before = weights(model, tmp_path / "before")
    targets = r".*experts\.(gate_up_proj\.(0|1\.up)|down_proj\.\d)|.*q_proj|.*q_b_proj"
    delora.inject(model, DeLoRA(2), targets, overrides={r"down_proj\.1$": {"r": 3}})
    delora.export.vllm(shake(model), tmp_path / "vllm")
    factors = load_file(tmp_path / "vllm" / TENSORS)
    after = weights(delora.merge(model), tmp_path / "after")
    start, end = "base_model.model.", ".lora_A.weight"
    layers = {key.removeprefix(start).removesuffix(end) for key in factors if key.endswith(end)}
    of_experts = {layer for layer in layers if ".experts." in layer}
    assert of_experts == {key.removesuffix(".weight") for key in before if re.fullmatch(names + r"\.weight", key)}
    for layer in layers:
        change = factors[f"{start}{layer}.lora_B.weight"] @ factors[f"{start}{layer}{end}"]
        torch.testing.assert_close(before[f"{layer}.weight"] + change, after[f"{layer}.weight"], rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "vllm" / CONFIG).read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert "target_parameters" not in config
    for projection in {layer.rpartition(".")[2] for layer in of_experts}:  # vLLM packs each projection of all experts
        shapes = {factors[f"{start}{layer}{end}"].shape for layer in of_experts if layer.endswith(f".{projection}")}
        assert len(shapes) == 1


def test_experts_that_vllm_holds_together_are_written_together(tmp_path):
    model = shake(delora.inject(joint(), LoRA(2), ["experts.gate_up_proj", "experts.down_proj"]))
    delora.export.vllm(model, tmp_path / "vllm")
    delora.export.peft(model, tmp_path / "peft")
    first, second = (load_file(tmp_path / kind / TENSORS) for kind in ("vllm", "peft"))
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[key]) for key, t in first.items())
    assert {key.removeprefix("base_model.model.model.layers.0.mlp.experts.") for key in first} == {
        f"{wrapper}lora_{factor}.weight" for wrapper in ("", "base_layer.") for factor in "AB"
    }


def test_a_rank_of_experts_beyond_what_vllm_is_started_for_is_refused(tmp_path):
    model = delora.inject(mixture(), DeLoRA(9), ["experts.down_proj"])
    with pytest.raises(ValueError, match=r"mlp.experts.\d.down_proj has rank 18, and vLLM is started for 16"):
        delora.export.vllm(model, tmp_path)
