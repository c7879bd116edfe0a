"""What a language model answers to a chat, and how it goes on with a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from delora.data.chats import end_of_turn, render
from delora.data.examples import DataError

__all__ = ["answer", "continued", "stops"]


def answer(model: Any, tokenizer: Any, messages: Sequence[Mapping[str, Any]], tokens: int = 256) -> str:
    """The model's most probable answer to a chat, token by token, of at most ``tokens`` tokens.

    The chat is rendered by the tokenizer's template, as in training; the answer ends where a turn of the template ends.

    Raises:
        DataError: the template refuses the chat, or the chat fills all the tokens that the model takes.
    """
    text = render([dict(message) for message in messages], tokenizer, prompt=True)
    return continued(model, tokenizer, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokens).strip()


@torch.no_grad()
def continued(model: Any, tokenizer: Any, ids: Sequence[int], tokens: int = 256) -> str:
    """How the model goes on after these token ids: its most probable text, of at most ``tokens`` tokens.

    Raises:
        DataError: there are none, or as many as the model takes.
    """
    model.eval()
    most = getattr(model.config, "max_position_embeddings", None) or len(ids) + tokens
    if not 0 < len(ids) < most:
        raise DataError(f"the prompt has {len(ids):,} tokens, and the model takes at least 1 and at most {most - 1:,}")
    asked, ends = torch.tensor([list(ids)], device=next(model.parameters()).device), stops(model, tokenizer)
    made = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=min(tokens, most - len(ids)),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = made[0, len(ids) :].tolist()
    return str(tokenizer.decode(new[:-1] if new and new[-1] in ends else new, skip_special_tokens=True))


def stops(model: Any, tokenizer: Any) -> list[int]:
    """The ids of the tokens that end an answer: the model's, the tokenizer's, and that of its chat template if it has one."""
    given = model.generation_config.eos_token_id
    turn = None if tokenizer.chat_template is None else end_of_turn(tokenizer)
    ids = [*([given] if isinstance(given, int) else given or []), tokenizer.eos_token_id, turn]
    return list(dict.fromkeys(i for i in ids if i is not None))
