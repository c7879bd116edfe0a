"""The grids of the studies of reach, which are the same on every task: which strength, rate, start and rank need no search.

Every seed is new. `knobs.strength_mode`, `knobs.default`, `knobs.knob` and `knobs.equal_starts` are the rules; they
were committed with this file, before the first run.

1. ``strength``: how the strength is learned, at one reach; ``strength-own``, on digits alone: at the reach that is best for
   each mode. `knobs.strength_mode` says which way is the library's default.
2. ``choose``: reach and rate at that mode. `knobs.default` chooses both, from validation scores.
3. ``starts``: starts of rank r against ``subtract`` at the same reach, with the rows of ``strength`` for the latter.
4. ``knob``: the chosen reach at other seeds, over rates and ranks, against LoRA's rates. `knobs.knob` judges.
5. ``few``: starts and rates in the set-up of `delora finetune`: all linear layers, few rows. Stopped; no rule was applied.
6. ``own-choose``, ``own-judged``: which reach and rate `delora finetune` begins with, for a model with a new head.
   `knobs.own_default` chooses, `knobs.own_cells` judges.
7. ``chats-choose``, ``chats-judged``: the same for chats, with what is forgotten. `knobs.chats_default` chooses.
8. ``knob-start``: DeLoRA's runs of ``knob`` with the start that ``equal`` chose, on digits and film reviews.
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

# ---------------------------------------------------------------- 1.
REACH = 0.1  # where modes and starts are compared
RATES = (0.03, 0.1, 0.3)
BALL = "paper.studies.ball:InBall"  # as a recipe names a method of one's own
# Each mode: the method, its fields, and lam's rate: a share of the rate of A and B, or (text) a number. All have the start that
# was the library's default when they were compared.
MODES: dict[str, tuple[str, Fields, float | str]] = {
    "fixed": ("delora", {"start": "subtract", "learn_lam": False}, 0.5),
    "learned": ("delora", {"start": "subtract", "learn_lam": True}, 0.5),
    "learned slowly": ("delora", {"start": "subtract", "learn_lam": True}, "3e-3"),
    "in a ball": (BALL, {"start": "subtract", "learn_lam": True}, 1.0),
}
MODE_SEEDS = (120, 121, 122, 123, 124)
# On digits the first runs at that reach, seen when a third of the others were done, were short of strength: "fixed" was 12
# points below "learned", whose lam grew by half. So each mode is compared there at its own reach as well, at new seeds.
OWN_REACHES, OWN_SEEDS = (0.2, 0.4), (130, 131, 132, 133, 134)

# ---------------------------------------------------------------- 2.
REACHES, CHOOSING_RATES, CHOOSING_SEEDS = (0.03, 0.06, 0.12, 0.25), (0.03, 0.1, 0.3), (100, 101)

# ---------------------------------------------------------------- 3. rates, seeds and reach are those of the modes
STARTS: dict[str, Fields] = {
    "paired": {"start": "paired"},
    "soft 0.03": {"start": "soft", "softness": 0.03},
    "soft 0.1": {"start": "soft", "softness": 0.1},
}

# ---------------------------------------------------------------- 5.
# `equal` has the layers query and value, and 63 steps and more on 1,000 sentences. Seen before this grid was written, on
# made-up tickets in three classes with all linear layers, three seeds: at rate 0.03 `soft 0.03` ends at chance after 24
# steps, `subtract` at 100 percent; at 0.01 all starts are at 100 percent. Why: AdamW moves every entry of B by about the rate
# at each step. From B = 0 a term has 71 percent of its bound after one step at a rate of its softness, whatever the
# direction; a B that is drawn has entries of 1 / sqrt(3 r), 0.2 at rank 8, and turns by the share rate / 0.2. So a softness
# of 0.3 should be as gentle: it is tried.
FEW_ROWS, FEW_EPOCHS, STEP_RATES = 100, (2, 10), (0.01, 0.03, 0.1)
FEW_SEEDS = (140, 141, 142, 143, 144)
FEW_STARTS: dict[str, Fields] = {"subtract": {"start": "subtract"}, **STARTS, "soft 0.3": {"start": "soft", "softness": 0.3}}

# ---------------------------------------------------------------- 6.
# Seen in the first 45 rows of `few`: at the rates 0.03 and 0.1 every start ends at chance there, at 0.01 `subtract` does not.
# The reach 0.1 and the rate 0.1 that `delora finetune` begins with were chosen with the layers query and value (`choose`); it
# adapts all linear layers, so that more of the model changes. `few` was stopped for these runs, whose batches and epochs are
# its own.
OWN_ROWS = {100: (10, 4), 1000: (6, 32)}  # epochs, and rows in a batch
OWN_GRID, OWN_LORA_RATES = ((0.03, 0.1), (0.003, 0.01, 0.03, 0.1)), (3e-4, 1e-3, 3e-3)
OWN_CHOOSING, OWN_JUDGING, OWN_FACTORS = (150, 151), (152, 153, 154), (1.0, 3.0)
HEADLINES = (210, 211, 212)  # a table that chose nothing; by the same claim, set before its first run

# ---------------------------------------------------------------- 7.
# `delora finetune` begins with reach 0.1 and rate 0.01 for chats, which no study chose: the rate is from the chat model's runs
# with the layers query and value, the reach from film reviews. Seen before this grid: forty answers of a pirate, learned so,
# make the model answer every question as a pirate; and one run of these chats (40 rows, seed 9), at 0.1 and 0.01, had 1.7 times
# the base model's perplexity on newspapers. So what is forgotten is in the rule. A batch has as many rows, and a run as
# many epochs, as `delora finetune` takes.
# The rates 0.001, and 3e-3 of LoRA, were added after ten runs, in which DeLoRA's lowest and LoRA's highest rate were the best.
CHATS_ROWS = {40: (3, 4), 120: (3, 4)}  # epochs, and rows in a batch
CHATS_GRID, CHATS_LORA_RATES = ((0.03, 0.1), (0.001, 0.003, 0.01, 0.03)), (1e-4, 3e-4, 1e-3, 3e-3)
CHATS_CHOOSING, CHATS_JUDGING = (170,), (171, 172, 173)
CHATS_JUDGED = (40,)  # rows: a run on 120 takes five minutes
FORGOTTEN = 1.25  # times the base model's perplexity on newspapers: the most that a default may come to

# ---------------------------------------------------------------- 4.
RANKS, JUDGED_RATES, JUDGED_SEEDS = (8, 4, 32), (0.03, 0.1, 0.3, 0.6), (110, 111, 112, 113, 114)
LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # alpha is 2 r
# The rule of `choose` gave 0.25, because digits, which have the same weight in it, need it: on film reviews that reach had lost
# 15 points at one rate, while all lower ones lay within a point. So a second claim was set then, before its runs: for models
# that others have pretrained, film reviews and chat, this reach is enough. It is judged by the same rule.
PRETRAINED = 0.1
# Sentences have rank 8 alone: a run takes half a minute. Product ratings chose nothing and are judged alone: no time.
FEW_RATES = (0.03, 0.1, 0.6)
# The chat model's runs take minutes, a subject's half a minute: one rank, fewer rates and seeds.
CHAT_SEEDS, CHAT_LORA_RATES = (115, 116), (1e-3, 3e-3, 1e-2)
SUBJECT_SEEDS, SUBJECT_LORA_RATES = (115, 116), (5e-4, 2e-3, 8e-3)


def rates(adapter: Fields, lr: float, lam_lr: float) -> dict[str, float | None]:
    """The rates as a recipe takes them: it refuses one for a strength that is not learned.

    >>> rates({"learn_lam": False}, 0.1, 0.05), rates({"learn_lam": True}, 0.1, 0.05)
    ({'lr': 0.1, 'lam_lr': None}, {'lr': 0.1, 'lam_lr': 0.05})
    """
    return {"lr": lr, "lam_lr": lam_lr if adapter.get("learn_lam", True) else None}


def fixed(own: float) -> Fields:
    """DeLoRA of rank 8 at a reach, its strength not learned, as a recipe's table.

    >>> fixed(0.1)["reach"], fixed(0.1)["learn_lam"]
    (0.1, False)
    """
    return {"method": "delora", "r": 8, "reach": own} | MODES["fixed"][1]


def lam_lr(mode: str, lr: float) -> float:
    """lam's rate beside the rate of A and B.

    >>> lam_lr("learned", 0.1), lam_lr("learned slowly", 0.1)
    (0.05, 0.003)
    """
    share = MODES[mode][2]
    return float(share) if isinstance(share, str) else lr * share
