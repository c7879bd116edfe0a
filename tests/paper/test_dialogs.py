"""Conversations of a package become a folder that `delora finetune` reads; the rule that chooses the settings for chats."""

from __future__ import annotations

import pytest
import yaml

from delora.data import tables
from paper.standins import dialogs
from paper.studies import knobs, reach
from paper.studies.knobs import Task


def test_every_conversation_once_and_with_an_answer(tmp_path):
    topics = {
        "odd": [["Hi", "Hello", "How are you?"], ["What year was it?", 1963]],  # the last turn of the first has no answer
        "twice": [["Hi", "Hello"], ["Alone"]],
        "tech_support": [["My mouse is dead.", "Change its batteries."]],
    }
    for name, conversations in topics.items():
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump({"conversations": conversations}))
    asked = [[(turn["role"], turn["content"]) for turn in chat] for chat in dialogs.read(tmp_path)]
    assert asked == [[("user", "Hi"), ("assistant", "Hello")], [("user", "What year was it?"), ("assistant", "1963")]]


def test_no_chat_is_in_two_parts(tmp_path):
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(200)]
    table = tables.read(dialogs.prepared(40, 3, tmp_path / "made", chats))
    assert table.kind == "chat"
    assert table.sizes() == {"train": 40, **dialogs.HELD_OUT}
    asked = [row["messages"][0]["content"] for rows in table.parts.values() for row in rows]
    assert len(set(asked)) == len(asked)


def row(case: str, lr: float, validation: float, times: float, **more):
    rows = [{"case": case, "lr": lr, "seed": 1, "rows": n, "validation": validation} for n in reach.CHATS_ROWS]
    return [r | {"perplexity": 50 * times, "perplexity_before": 50.0} | more for r in rows]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(9.0, ((0.1, 0.03), 3e-3)), (1.25, ((0.1, 0.01), 3e-4)), (0.5, ((0.03, 0.001), 1e-4))],  # the last: none fits
)
def test_the_settings_for_chats_forget_no_more_than_the_limit(limit, expected, monkeypatch):
    monkeypatch.setattr(reach, "FORGOTTEN", limit)
    rows = []
    for own in reach.CHATS_GRID[0]:
        for lr in reach.CHATS_GRID[1]:  # the further, the better, and the more is forgotten
            rows += row("DeLoRA", lr, own * lr, 1 + 10 * own * lr if own * lr < 3e-3 else 4.0, reach=own)
    for lr in reach.CHATS_LORA_RATES:
        rows += row("LoRA", lr, lr, 1 + 300 * lr)
    assert knobs.chats_default(Task(rows, 0.0)) == expected


def test_what_is_forgotten_is_a_mean_of_logarithms():
    rows = row("LoRA", 1.0, 0.5, 1.0)[:1] + row("LoRA", 1.0, 0.5, 4.0)[:1] + row("LoRA", 2.0, 0.5, 9.0)
    assert knobs.forgotten(Task(rows, 0.0), lr=1.0) == pytest.approx(2.0)
