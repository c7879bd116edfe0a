"""What a chat model answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from delora.data.chats import end_of_turn, render

__all__ = ["answer", "stops"]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, messages: Sequence[Mapping[str, Any]], tokens: int = 256) -> str:
    """The model's most probable answer to a chat, token by token, of at most ``tokens`` tokens.

    The chat is rendered by the tokenizer's template, as in training; the answer ends where a turn of the template ends.

    Raises:
        DataError: the template refuses the chat.
    """
    model.eval()
    device = next(model.parameters()).device
    text = render([dict(message) for message in messages], tokenizer, prompt=True)
    asked = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).to(device)
    ends = stops(model, tokenizer)
    made = model.generate(
        input_ids=asked["input_ids"],
        attention_mask=asked["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = made[0, asked["input_ids"].shape[1] :].tolist()
    return str(tokenizer.decode(new[:-1] if new and new[-1] in ends else new, skip_special_tokens=True)).strip()


def stops(model: Any, tokenizer: Any) -> list[int]:
    """The ids of the tokens that end an answer: the model's, the tokenizer's, and the one of its chat template."""
    given = model.generation_config.eos_token_id
    ids = [*([given] if isinstance(given, int) else given or []), tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return list(dict.fromkeys(i for i in ids if i is not None))
