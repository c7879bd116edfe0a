"""Studies: every run has a recipe that is valid; what the strength chosen after training is worth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import delora
from delora.tasks import read
from delora.training import defaults
from paper.studies import chat, critics, dial, dialogs, fashion, headlines, knobs, sentences
from paper.studies.verdicts import NO, YES

MODULES = (chat, critics, dialogs, fashion, headlines, sentences)


@pytest.mark.parametrize(("module", "study"), [(m, study) for m in MODULES for study in m.STUDIES])
def test_every_case_of_a_study_has_a_valid_recipe(module, study, tmp_path):
    cases = {job.case: job for job in module.STUDIES[study]()}
    assert cases
    for job in cases.values():
        made = module.experiment(job, tmp_path)
        assert made.seed == job.seed
        assert made.train.lr == getattr(job, "lr", made.train.lr)


def turned_model():
    torch.manual_seed(0)
    model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    with torch.no_grad():
        delora.models.adapters(model)["0"].adapter.B.copy_(torch.randn(4, 2))
    return model


def strength(model):
    return delora.models.adapters(model)["0"].adapter.strength


def test_the_dial_keeps_the_budget_and_reports_the_test_score_at_what_it_chose():
    model = turned_model()
    row = dial.dialled(
        model,
        validation=lambda m: -abs(strength(m) - 1.5),
        test=lambda m: 10 * strength(m),
        kept=lambda m: 1 - 0.5 * strength(m),
        base=1.0,
    )
    assert (row["strength"], row["chosen"]) == (1.5, 15.0)
    assert row["within"] == 1.0  # half of the base's score is left there, and less at 1.25
    assert dial.at(row, 0.5) == {"strength": 0.5, "validation": -1.0, "test": 5.0, "kept": 0.75}


def test_what_choosing_is_worth_is_paired_by_seed():
    def row(seed, chosen, trained):
        return {"case": "a", "seed": seed, "chosen": chosen, "curve": [{"strength": 1.0, "test": trained}]}

    worth = dial.worth([row(1, 0.6, 0.5), row(2, 0.9, 0.7), {"case": "b", "seed": 1}], "a")
    assert (worth.score, worth.gain) == pytest.approx((0.75, 0.15))
    assert worth.error == pytest.approx(0.05)


def test_delora_finetune_begins_with_what_the_rules_chose():
    assert knobs.own_default()[0] == (defaults.REACH, defaults.RATE)
    assert knobs.chats_default(knobs.read("chats-choose")["chats"])[0] == (defaults.REACH, defaults.CHAT_RATE)


def test_the_critics_of_both_studies_are_every_variant_of_the_recipe():
    names = [{job.case for job in critics.STUDIES[study]()} for study in critics.STUDIES]
    assert names[0] == set(critics.PAIR)
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == {variant.name for variant in read(critics.RECIPE).variants}


def test_delora_is_judged_against_lora_on_sentences_and_on_documents():
    rows = [
        {"case": case, "seed": seed, "test": 0.8 + 0.001 * seed, "documents": documents + 0.001 * seed}
        for case, documents in (("LoRA", 0.8), ("DeLoRA", 0.7))
        for seed in (1, 2, 3)
    ]
    assert [condition.outcome for condition in critics.judged(rows).parts] == [YES, NO]
