"""Which tokens of a chat are trained, beside masks made by hand; rows in one are the rows one by one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MistralConfig

from delora.data import alpaca
from delora.data.alpaca import IGNORED, Instruction
from delora.data.chats import encode, end_of_turn, messages_of, render, turns
from delora.data.examples import DataError
from delora.data.packing import Collator, bins, keeps_apart, packed
from delora.evaluation.language import token_sums
from tests.tiny_chat import CHATML, GEMMA, LLAMA3, MISTRAL, tokenizer

Turn = dict[str, Any]
SYSTEM = {"role": "system", "content": "Be brief"}
CHAT = [
    {"role": "user", "content": "who are you"},
    {"role": "assistant", "content": "I am a pirate"},
    {"role": "user", "content": "What is the time"},
    {"role": "assistant", "content": "noon"},
]
# By hand: each template's text of the chat in pieces, every second one of them trained.
BY_HAND = {
    "chatml": (
        CHATML,
        [SYSTEM, *CHAT],
        [
            "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nwho are you<|im_end|>\n<|im_start|>assistant\n",
            "I am a pirate<|im_end|>",
            "\n<|im_start|>user\nWhat is the time<|im_end|>\n<|im_start|>assistant\n",
            "noon<|im_end|>",
            "\n",
        ],
    ),
    "llama3": (
        LLAMA3,
        [SYSTEM, *CHAT],
        [
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nwho are you<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "I am a pirate<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\nWhat is the time<|eot_id|><|start_header_id|>assistant"
            "<|end_header_id|>\n\n",
            "noon<|eot_id|>",
        ],
    ),
    "gemma": (
        GEMMA,
        CHAT,
        [
            "<bos><start_of_turn>user\nwho are you<end_of_turn>\n<start_of_turn>model\n",
            "I am a pirate<end_of_turn>",
            "\n<start_of_turn>user\nWhat is the time<end_of_turn>\n<start_of_turn>model\n",
            "noon<end_of_turn>",
            "\n",
        ],
    ),
    "mistral": (
        MISTRAL,
        CHAT,
        [
            "<s>[INST] who are you [/INST]",
            " I am a pirate</s>",
            "[INST] What is the time [/INST]",
            " noon</s>",
        ],
    ),
}
# ChatML that marks its answers; in the second one without the token that ends them.
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}",
)
ENDLESS = MARKED.replace(
    "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
)
BY_HAND |= {name: (template, *BY_HAND["chatml"][1:]) for name, template in (("marked", MARKED), ("marked-less", ENDLESS))}


def expected(tokens: Any, pieces: list[str]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for k, piece in enumerate(pieces):
        some = tokens(piece, add_special_tokens=False)["input_ids"]
        ids += some
        labels += some if k % 2 else [IGNORED] * len(some)
    return ids, labels


@pytest.mark.parametrize("name", BY_HAND)
def test_the_trained_tokens_are_those_marked_by_hand(name):
    template, chat, pieces = BY_HAND[name]
    tokens = tokenizer(template)
    made = encode([{"messages": chat}], tokens, 500)
    ids, labels = expected(tokens, pieces)
    assert made.rows[0]["input_ids"].tolist() == ids == tokens.apply_chat_template(chat)["input_ids"]
    assert made.rows[0]["labels"].tolist() == labels
    assert (made.cut, made.untrained, made.joined, made.endless) == (0, 0, 0, 0)
    assert turns(chat, tokens).answers()[0].strip().startswith("I am a pirate")
    assert tokens.convert_ids_to_tokens(end_of_turn(tokens)) in pieces[1]


@pytest.mark.parametrize("name", BY_HAND)
def test_of_a_prompt_nothing_is_trained(name):
    """The prompt's own answers are not, whether it is a text or a conversation; what was trained is what is then asked for."""
    template, chat, pieces = BY_HAND[name]
    tokens = tokenizer(template)
    _, labels = expected(tokens, [*pieces[:1], "", "".join(pieces[1:3]), *pieces[3:]])
    assert encode([{"prompt": chat[:-1], "completion": chat[-1:]}], tokens, 500).rows[0]["labels"].tolist() == labels
    made = encode([{"prompt": "who are you", "completion": "arr"}], tokens, 500).rows[0]
    asked = tokens.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]
    first = made["labels"].ne(IGNORED).int().argmax().item()
    assert made["input_ids"][:first].tolist() == asked  # exactly what a server makes of the question


def test_an_answer_that_shares_a_token_with_its_prompt():
    """The prompt ends with a space, which a tokenizer of this kind puts into the answer's first word."""
    spaced = (
        "{% for m in messages %}{{ 'user: ' + m['content'] + '\n' if m['role'] == 'user' else 'assistant: ' + m['content'] + "
        "eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokens = tokenizer(spaced)
    made = encode([{"prompt": "who", "completion": "I am a pirate"}], tokens, 500)
    assert made.joined == 1
    trained = [i for i in made.rows[0]["labels"].tolist() if i != IGNORED]
    assert tokens.decode(trained) == " am a pirate<|im_end|>"
    assert encode([{"prompt": "who", "completion": "I am a pirate"}], tokenizer(), 500).joined == 0


def test_a_template_whose_turns_have_no_end_is_told():
    tokens = tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    assert encode([{"messages": CHAT}], tokens, 500).endless == 1
    assert end_of_turn(tokens) is None


FORGETS = (  # as templates of models that think: the last answer is rendered in another way than those before
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '(thought) ' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        (FORGETS, {"messages": CHAT}, r"mine, row 1, message 2: .* renders a chat otherwise .*'\(thought\) .*generation"),
        (GEMMA, {"messages": [SYSTEM, *CHAT]}, r"mine, row 1: the chat template .* \(system, user.*System role not supported"),
        (DROPS, {"messages": [SYSTEM, *CHAT]}, "mine, row 1, message 1: the chat template .* drops words of system"),
        (CHATML, {"messages": CHAT, "tools": [{"type": "function"}]}, "mine, row 1: .* has no place for tools"),
        (CHATML, {"messages": CHAT[1:]}, "mine, row 1: a chat begins with a message of the user"),
        (CHATML, {"prompt": CHAT[:1]}, "mine, row 1: expected messages, a prompt and its completion, or a text; got prompt"),
        (CHATML, {"messages": [{"role": "user", "content": ["x"]}, CHAT[1]]}, "message 1: the content of user is no text"),
        (None, {"messages": CHAT}, "has no chat template: give data.template"),
    ],
)
def test_what_a_template_cannot_do_is_refused(template, row, words):
    with pytest.raises(DataError, match=words):
        encode([row], tokenizer(template), 500, "mine")


def test_tools_and_their_calls_are_rendered():
    """A file's arguments may be a string of JSON, as OpenAI writes them; a template puts out what it is given as JSON."""
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['tool_calls'] %}"
        "{{ m['tool_calls'][0]['function']['arguments'] | tojson }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "time", "arguments": '{"zone": "there"}'}}
    chat = [CHAT[2], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "noon"}, CHAT[3]]
    tools = [{"type": "function", "function": {"name": "time", "parameters": {}}}]
    tokens = tokenizer(template)
    made = encode([{"messages": chat, "tools": tools}], tokens, 500).rows[0]
    trained = tokens.decode([i for i in made["labels"].tolist() if i != IGNORED])
    assert trained == '{"zone": "there"}<|im_end|>noon<|im_end|>'
    assert '"name": "time"' in tokens.decode(made["input_ids"])
    unread = call | {"function": {"name": "time", "arguments": "no JSON"}}
    messages, _ = messages_of({"messages": [CHAT[0], CHAT[1] | {"tool_calls": [unread]}]}, "row 1")
    assert messages[1]["tool_calls"] == [unread]


def test_what_is_cut_and_what_is_then_left_out():
    tokens = tokenizer()
    rows = [{"messages": CHAT[:2]}, {"prompt": "who are you " * 20, "completion": "arr"}]
    whole = len(encode(rows[:1], tokens, 500).rows[0]["labels"])
    made = encode(rows, tokens, whole - 2)  # of the first one the end of its answer is cut off
    assert (len(made.rows), made.cut, made.untrained) == (1, 2, 1)
    assert made.trained < encode(rows[:1], tokens, 500).trained


def test_every_token_of_a_text_is_predicted_once():
    tokens = tokenizer(None)
    text = "who are you I am a pirate " * 9
    ids = [*tokens(text)["input_ids"], tokens.eos_token_id]
    made = encode([{"text": text}], tokens, 7)
    assert made.cut == made.untrained == 0
    assert [i for row in made.rows for i in row["labels"].tolist() if i != IGNORED] == ids[1:]
    assert max(len(row["labels"]) for row in made.rows) == 7
    plain = encode([{"prompt": "who are", "completion": " you"}], tokens, 50).rows[0]  # without a template: as they stand
    assert plain["input_ids"].tolist() == [*tokens("who are")["input_ids"], *tokens(" you")["input_ids"], tokens.eos_token_id]


@pytest.mark.parametrize("item", [Instruction("Be brief", "arr"), Instruction("who", "I am", "a pirate")])
def test_the_template_of_alpaca_renders_what_its_script_encodes(item):
    tokens = tokenizer()
    tokens.chat_template = alpaca.template(tokens)
    message = {"role": "user", "content": item.instruction} | ({"input": item.input} if item.input else {})
    made = encode([{"messages": [message, {"role": "assistant", "content": item.output}]}], tokens, 500).rows[0]
    script = alpaca.encode(item, tokens, 500, response_only=True)
    assert made["input_ids"].tolist() == script["input_ids"]
    assert made["labels"].tolist() == script["labels"]
    longer = render([SYSTEM, message, CHAT[1], CHAT[2]], tokens)
    assert longer.startswith("Be brief\n\n### Instruction:\n")
    assert longer.endswith("I am a pirate<|im_end|>\n\n### Instruction:\nWhat is the time\n\n### Response:")
    with pytest.raises(DataError, match="has no turn of tool here"):
        render([message, {"role": "tool", "content": "x"}], tokens)


# ---------------------------------------------------------------- packing


def rows_of(n: int, longest: int = 20) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(n)
    made = []
    for _ in range(n):
        ids = torch.randint(50, (int(torch.randint(2, longest + 1, (), generator=draw)),), generator=draw)
        labels = torch.where(torch.rand(len(ids), generator=draw) < 0.6, ids, IGNORED)
        made.append({"input_ids": ids, "labels": labels})
    return made


def tiny_model(config: Any, attention: str | None) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **({} if attention is None else {"attn_implementation": attention}))
    for p in model.parameters():  # far from an average over what is attended to
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    model.config.use_cache = False
    return (model if attention == "eager" else model.double()).eval()  # eager's softmax is in float32


SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(("attention", "close"), [("sdpa", 1e-12), ("eager", 1e-6)])
@pytest.mark.parametrize("config", [LlamaConfig(**SHAPE, **HEADS), MistralConfig(**SHAPE, **HEADS, sliding_window=4)])
def test_rows_in_one_are_the_rows_one_by_one(config, attention, close):
    """The loss is the mean over all trained tokens, whichever way the rows are laid out, and so is its gradient."""
    model = tiny_model(config, attention)
    assert keeps_apart(model)
    rows = rows_of(9)
    total, count = torch.zeros(()), 0
    for row in rows:
        logs = model(input_ids=row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
        trained = row["labels"][1:] != IGNORED
        total = total - logs.gather(-1, row["input_ids"][1:, None])[trained].sum()
        count += int(trained.sum())
    (total / count).backward()
    one_by_one = [p.grad.clone() for p in model.parameters()]
    for some in (packed(rows, 24), packed(rows, 1000), rows):
        model.zero_grad()
        batch = Collator(pad=0)(some)
        output = model(**batch)
        logits, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
        loss.backward()
        assert loss.item() == pytest.approx((total / count).item(), rel=close)
        assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)  # which transformers takes in float32
        sums = token_sums(output.logits, batch["labels"]).sum(0).tolist()
        assert sums == pytest.approx([total.item() * -1, count], rel=1e-6)
        for p, g in zip(model.parameters(), one_by_one, strict=True):
            assert (p.grad - g).norm() <= 10 * close * g.norm()


def test_a_model_that_sees_the_row_before_is_found():
    assert not keeps_apart(tiny_model(MambaConfig(**SHAPE, state_size=4), None))


def test_bins_hold_every_row_once_and_no_more_than_their_size():
    draw = random.Random(0)
    for _ in range(50):
        size = draw.randint(5, 40)
        lengths = [draw.randint(1, size) for _ in range(draw.randint(1, 60))]
        made = bins(lengths, size)
        assert sorted(i for group in made for i in group) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in group) <= size for group in made)
        halves = [sum(lengths[i] for i in group) for group in made]
        assert all(a + b > size for k, a in enumerate(halves) for b in halves[k + 1 :])  # no two of them would be one
