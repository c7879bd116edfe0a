"""The digits stand-in: its data and runs; its studies, which go on where they stopped; the rules of the claims."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from rich.console import Console

import delora
from delora import DeLoRA, LoRA
from delora.models import adapters
from paper.standins.digits import TARGETS, DigitsViT, Job, accuracy, digits, finetune, turned
from paper.studies import chat as chat_study
from paper.studies import claims, standins, starts, strengths
from paper.studies.cut import exported
from paper.studies.digits import best, read, run
from paper.studies.verdicts import (
    CHANCE,
    Condition,
    Gain,
    Verdict,
    area,
    beside_r2,
    by_rank,
    chat,
    cut,
    decade,
    gains,
    judge,
    ladder,
    r1,
    r2,
    r3,
    r4,
    r5,
    start,
    widest,
)

JOB = Job("study", "case", DeLoRA(r=2, lam=4.0), lr=1e-2, lam_lr=5e-3, seed=3, steps=4)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return DigitsViT()


def test_the_parts_of_the_data():
    data = digits()
    whole = [data.pretrain, data.validation, data.test]
    assert [len(y) for _, y in whole] == [1000, 398, 399]
    assert len(data.train[1]) == 100
    pictures = [picture.numpy().tobytes() for x, _ in whole for picture in x]
    assert len(set(pictures)) == len(pictures) == 1797  # no picture twice, so none in two parts
    assert torch.equal(data.train[0], data.pretrain[0][:100])
    assert all(x.min() == 0 and x.max() == 1 for x, _ in whole)


def test_turning():
    x = digits().test[0][:3]
    back = x
    for _ in range(4):
        back = turned(back)
    torch.testing.assert_close(back, x)
    assert torch.equal(turned(x)[:, 0, 0], 1 - x[:, 0, 7])  # the upper right corner comes to the upper left


def test_a_rate_of_zero_leaves_the_base(base, tmp_path):
    data = digits()
    row = finetune(base, replace(JOB, lr=0.0, lam_lr=0.0), tmp_path)
    assert row["distance"] == pytest.approx(0, abs=1e-12)  # computed in float64
    assert row["test"] == accuracy(base, turned(data.test[0]), data.test[1])
    assert row["upright"] == accuracy(base, *data.test)


def test_a_run_depends_on_its_settings_alone(base, tmp_path):
    state = {k: v.clone() for k, v in base.state_dict().items()}
    first, second = (finetune(base, replace(JOB, watched=(1, 2, 4)), tmp_path) for _ in range(2))
    other = finetune(base, replace(JOB, seed=4), tmp_path)
    assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items())
    timed = first.pop("seconds"), second.pop("seconds")
    assert min(timed) > 0
    assert first == second
    assert other["distance"] != first["distance"]
    assert [point["step"] for point in first["trace"]] == [1, 2, 4]
    assert ["turn_B" in point for point in first["trace"]] == [True, True, False]  # of one step, or not at all
    assert first["trace"][-1]["distance"] == first["distance"] <= first["bound"]


def test_what_diverges_has_no_scores(base, tmp_path):
    row = finetune(base, replace(JOB, method=LoRA(r=2), lr=1e30), tmp_path)
    assert row["diverged"] is True
    assert "test" not in row


def test_the_noisy_objective_is_for_training_only(base):
    x, y = digits().test
    still = base(x, y)["loss"]
    base.noisy = True
    assert torch.equal(base(x)["logits"], base(x)["logits"])
    assert not torch.equal(base(x, y)["loss"], still)


def test_the_targets_are_the_attention_layers(base):
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    assert set(TARGETS) <= names


# ---------------------------------------------------------------- studies


@pytest.mark.slow
def test_a_study_runs_what_is_missing(tmp_path):
    jobs = [replace(JOB, steps=1, seed=seed) for seed in range(3)]
    screen = io.StringIO()
    run("study", jobs[:2], tmp_path, Console(file=screen), workers=1, base_steps=1)
    file = tmp_path / "study.jsonl"
    kept = file.read_text().splitlines()
    file.write_text(kept[0] + "\n" + kept[1][:40])  # stopped while it wrote
    run("study", jobs, tmp_path, Console(file=screen), workers=1, base_steps=1)
    rows = read("study", tmp_path)
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert file.read_text().startswith(kept[0] + "\n")
    before = file.read_bytes()
    run("study", jobs, tmp_path, Console(file=screen), workers=1, base_steps=1)
    assert file.read_bytes() == before


def test_the_base_rate_is_the_best_by_validation(tmp_path, monkeypatch):
    method = LoRA(r=2)
    scores = {(1e-3, 8): 0.5, (1e-3, 9): 0.5, (1e-2, 8): 0.9, (1e-2, 9): 0.2}
    rows = [
        {"case": "LoRA", "method": str(method), "lr": lr, "seed": seed, "validation": score, "test": 1 - score}
        for (lr, seed), score in scores.items()
    ]
    monkeypatch.setattr("paper.studies.digits.read", lambda study: rows)
    assert best("tuning", {"LoRA": ([method], (1e-3, 1e-2))}) == {"LoRA": (method, 1e-2)}


def test_the_pages_are_what_the_kept_rows_say():
    assert claims.PAGE.read_text() == claims.page()
    assert starts.PAGE.read_text() == starts.page()
    assert standins.PAGE.read_text("utf-8") == standins.page()
    assert strengths.PAGE.read_text("utf-8") == strengths.page()


# ---------------------------------------------------------------- rules

F = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def made(scores, distances=None, bound=None):
    rows = []
    for case, values in scores.items():
        for i, (factor, value) in enumerate(zip(F, values, strict=True)):
            row = {"case": case, "factor": factor, "test": value, "distance": (distances or {}).get(case, [1.0] * 8)[i]}
            if bound and case == "DeLoRA":
                row["bound"] = bound
            rows.append(row)
    return twice(rows)


def twice(rows):
    """The same of two seeds, which agree: every condition is decided."""
    return [row | {"seed": seed} for seed in (0, 1) for row in rows]


def test_a_condition_is_decided_by_two_standard_errors():
    def outcome(values, **limit):
        rows = [{"seed": seed, "test": value} for seed, value in enumerate(values)]
        return judge(rows, lambda rows: fmean(r["test"] for r in rows), "{}", **limit)

    # Of a mean the jackknife's error is the standard error: 0.1 of these three.
    values = (0.5, 0.5, 0.5 + 0.3)
    assert outcome(values, least=0.39).text == "60.0 ± 10.0"
    assert [outcome(values, least=x).outcome for x in (0.39, 0.41, 0.79, 0.81)] == ["yes", "undecided", "undecided", "no"]
    assert [outcome(values, most=x).outcome for x in (0.39, 0.41, 0.79, 0.81)] == ["no", "undecided", "undecided", "yes"]
    assert outcome((0.5,), least=0.1).outcome == "undecided"  # one run
    assert outcome((math.inf, 9.0, 9.0), least=1.0).outcome == "yes"  # a run diverged; without it too
    assert outcome((math.inf, 0.0, 0.0), least=1.0).outcome == "undecided"


def test_one_condition_that_is_not_met_fails_a_claim():
    def claim(*outcomes):
        return Verdict("", "", tuple(Condition("", outcome) for outcome in outcomes)).outcome

    assert (claim("yes", "yes"), claim("yes", "undecided"), claim("no", "undecided")) == ("holds", "undecided", "fails")


def test_a_claim_is_undecided_where_its_seeds_disagree():
    rows = made(HOLDING)
    for row in rows:
        if (row["case"], row["factor"]) == ("ETHER+", 16.0):
            row["test"] = 0.6 if row["seed"] else 0.4
    assert r1(rows).outcome == "undecided"


HOLDING = {
    "LoRA": [0.6, 0.6, 0.6, 0.6, 0.6, 0.1, 0.1, 0.1],
    "DoRA": [0.6, 0.6, 0.7, 0.7, 0.7, 0.4, 0.1, 0.1],
    "DoRA, fixed magnitude": [0.6] * 6 + [0.05, 0.1],
    "ETHER+": [0.6] * 8,
    "DeLoRA": [0.6] * 6 + [0.5, 0.3],
}
FAR = {
    "LoRA": [1, 1, 2, 2, 3, 8, 10.1, 12],
    "DoRA": [1, 1, 2, 2, 3, 6, 7, 7],
    "DoRA, fixed magnitude": [1, 1, 2, 2, 3, 6, 8, 8],
    "ETHER+": [1, 1, 1, 1, 1, 1, 1.5, 1.9],
    "DeLoRA": [1, 1, 1, 1, 1, 1, 1.5, 1.9],
}


def changed(values, case, index, value):
    return values | {case: [value if i == index else v for i, v in enumerate(values[case])]}


def test_r1():
    assert r1(made(HOLDING)).holds
    assert not r1(made(changed(HOLDING, "LoRA", 5, 0.5))).holds  # still good at 8
    assert not r1(made(changed(HOLDING, "DeLoRA", 5, 0.49))).holds  # loses more than 10 points there
    assert not r1(made(changed(HOLDING, "ETHER+", 6, 0.47))).holds  # keeps less than 80 % at 16
    gone = made(HOLDING)
    for row in gone:
        if row["case"] == "LoRA" and row["factor"] == 8:
            del row["test"]  # diverged: counts as chance
    assert r1(gone).parts[0].text.startswith(f"at 8 times its base rate LoRA loses {100 * (0.6 - CHANCE):.1f}")


def test_r2():
    assert r2(made(HOLDING, FAR, 2.0)).holds
    assert not r2(made(HOLDING, changed(FAR, "LoRA", 6, 9.9), 2.0)).holds
    assert not r2(made(HOLDING, changed(FAR, "DoRA", 6, 9.0), 2.0)).holds
    assert not r2(made(HOLDING, changed(FAR, "DeLoRA", 7, 2.0), 2.0)).holds
    assert not r2(made(HOLDING, FAR, 1.8)).holds  # beyond the bound


def in_a_ball(distance, bounds):
    """Runs of DeLoRA with lam 4 at two factors, with these bounds at the end; the bound of the start is 4."""
    method = "DeLoRA(r=2, lam=4.0, )"
    ends = zip((1.0, 2.0), bounds, strict=True)
    rows = [{"case": "DeLoRA", "method": method, "factor": f, "distance": distance, "bound": bound} for f, bound in ends]
    alone = [{**row, "case": "lam alone"} for row in rows]
    return rows, alone, [{"case": "DeLoRA, lam fixed", "method": method, "distance": 1.0, "bound": 4.0}]


def test_the_bound_of_the_start_is_reported_beside_r2():
    within, radius = beside_r2(*in_a_ball(3.0, (5.0, 10.0)))
    assert "2 lam0 max(c) = 4.00. The largest distance of 5 runs" in within
    assert within.endswith("is 3.00, 75.0 % of it; runs beyond it: 0.")
    assert "at most 10.00, 2.50 times that of the start" in radius
    assert radius.count("5.0 at 1, 10.0 at 2 (rising throughout)") == 2
    beyond, radius = beside_r2(*in_a_ball(6.0, (10.0, 5.0)))
    assert beyond.endswith("is 6.00, 150.0 % of it; runs beyond it: 4.")
    assert "(falling throughout)" in radius


def test_a_run_that_diverged_is_beyond_the_bound_of_the_start():
    robustness, alone, prolonged = in_a_ball(3.0, (5.0, 10.0))
    gone = {"case": "DeLoRA", "method": robustness[0]["method"], "factor": 2.0, "diverged": True}
    assert beside_r2([*robustness, gone], alone, prolonged)[0].endswith("runs beyond it: 1.")


def test_r3():
    assert r3(made(HOLDING, FAR)).holds
    assert not r3(made(HOLDING, changed(FAR, "DoRA", 6, 8.5))).holds
    assert not r3(made(changed(HOLDING, "DoRA, fixed magnitude", 6, 0.2), FAR)).holds


def long(case, distances, scores):
    points = zip(distances, scores, strict=True)
    return {"case": case, "trace": [{"distance": d, "validation": s} for d, s in points]}


def test_r4():
    flat, ones = [1.0] * 12, [0.6] * 12
    grown = [1.0, 2.0] + [2.0 + 0.11 * i for i in range(1, 11)]  # from the second of twelve on by 55 %
    rows = [long("LoRA", grown, [0.6] * 11 + [0.3]), long("DoRA", grown, ones)]
    rows += [long("DeLoRA", flat, ones), long("DeLoRA, lam fixed", flat, ones)]
    assert r4(twice(rows)).holds
    assert not r4(twice([long("LoRA", flat, ones), *rows[1:]])).holds
    fallen = long("DeLoRA", flat, [0.6] * 11 + [0.2])  # further below its best than LoRA
    assert not r4(twice([*rows[:2], fallen, rows[3]])).holds
    assert not r4(twice([*rows[:2], long("DeLoRA", [1.0] * 11 + [1.21], ones), rows[3]])).holds


def test_r5():
    scores = {"lam alone": [0.6] * 8, "A and B alone": [0.6] * 8}
    distances = {"lam alone": [1, 1, 1, 1, 1, 1, 2, 2]}
    both = made({"DeLoRA": [0.6] * 8})
    assert r5(made(scores, distances), both).holds
    assert not r5(made(scores), both).holds  # lam's rate does nothing
    assert not r5(made(changed(scores, "A and B alone", 6, 0.4), distances), both).holds
    assert not r5(made(scores, distances), made({"DeLoRA": [0.6] * 6 + [0.4, 0.4]})).holds


def test_the_ladder():
    score = {"L0": 0.5, "L1": 0.55, "L2": 0.62, "E0": 0.3, "E1": 0.5, "E2": 0.55, "E3": 0.6, "E4": 0.62}

    def judged(**other):
        return ladder(twice([{"case": case, "test": value} for case, value in (score | other).items()])).holds

    assert judged()
    assert not judged(E1=0.4)
    assert not judged(L1=0.63)
    assert not judged(L1=0.61)


def test_the_area_counts_cells_near_the_best():
    def cell(case, lr, values, clip=0.0):
        return [{"case": case, "method": "m", "lr": lr, "clip": clip, "validation": v} for v in values]

    rows = cell("soft", 1e-2, [0.80, 0.80]) + cell("soft", 1e-1, [0.79, 0.79]) + cell("soft", 1.0, [0.6, 0.6])
    rows += cell("copy", 1e-2, [0.77, 0.77]) + cell("copy", 1e-1, [0.8, 0.8], clip=1.0)
    # The best cell's seeds agree: what counts is the standard error, 2.0 points at 80 % of 398 pictures.
    assert area(rows) == {("soft", 0.0): 2, ("copy", 0.0): 0, ("copy", 1.0): 1}


def test_the_widest_lam_of_a_start():
    def cell(lam, lr, value, case="subtract", clip=0.0):
        return {"case": case, "method": f"DeLoRA(r=8, lam={lam}, )", "lr": lr, "clip": clip, "validation": value}

    rows = [cell(4.0, lr, v) for lr, v in ((1e-3, 0.6), (1e-2, 0.8), (1e-1, 0.79))]
    rows += [cell(16.0, lr, v) for lr, v in ((1e-3, 0.8), (1e-2, 0.5), (1e-1, 0.1))]
    rows += [cell(1.0, 1e-2, 0.9, case="soft"), cell(1.0, 1e-2, 0.9, clip=1.0)]  # another start, and clipped: not counted
    assert widest(rows, "subtract") == {4.0: 2, 16.0: 1}


def over_a_sweep(case, scores):
    return [
        {"case": case, "lr": lr, "seed": seed} | ({} if value is None else {"validation": value})
        for seed, values in enumerate(scores)
        for lr, value in zip((1e-3, 1e-2, 1e-1, 1.0), values, strict=True)
    ]


def test_a_seed_is_not_judged_by_the_decade_that_it_chose():
    # The last seed would choose the upper decade, the others choose the lower one for it. A run that diverged is chance.
    rows = over_a_sweep("soft", [(0.6, 0.6, 0.6, 0.45), (0.6, 0.6, 0.6, 0.45), (0.0, 0.6, None, 0.9)])
    assert decade(rows, "soft", 0.3) == pytest.approx([0.55, 0.55, 0.3])
    by_start = gains([*rows, *over_a_sweep("subtract", [(0.5, 0.5, 0.5, 0.5)] * 3)], 0.3)
    assert by_start["subtract"] == Gain(pytest.approx(0.5), 0.0, 0.0)
    assert by_start["soft"].gain == pytest.approx(-0.1 / 3)
    assert by_start["soft"].error == pytest.approx(0.25 / 3)  # of 0.05, 0.05, -0.2: a deviation of 0.25 / sqrt(3), over sqrt(3)


def test_a_start_takes_the_place_of_subtract_by_its_gain_alone():
    def chosen(*tasks):
        none = {"subtract": Gain(0.5, 0.0, 0.0)}
        return start([none | {case: Gain(0.5 + gain, gain, error) for case, (gain, error) in t.items()} for t in tasks])

    name, mean = chosen({"soft": (0.04, 0.006)}, {"soft": (0.02, 0.008)})
    assert name == "soft"
    assert mean["soft"] == Gain(pytest.approx(0.53), pytest.approx(0.03), pytest.approx(0.005))
    assert chosen({"soft": (0.009, 0.006)}, {"soft": (0.0, 0.008)})[0] == "subtract"  # less than two standard errors
    assert chosen({"soft": (0.1, 0.006)}, {"soft": (-0.02, 0.008)})[0] == "subtract"  # a loss on one task
    assert chosen({"soft": (0.03, 0.001), "paired": (0.05, 0.001)})[0] == "paired"


def test_lam_by_the_rank_is_compared_at_each_ones_best_rate():
    def rows(case, r, lr, values):
        return [{"case": case, "r": r, "lr": lr, "validation": v} for v in values]

    made = rows("constant", 2, 1e-2, [0.7, 0.72]) + rows("constant", 2, 1e-1, [0.1, 0.9])
    made += rows("constant", 32, 1e-2, [0.7, 0.7]) + rows("by rank", 2, 1e-3, [0.8, 0.82])
    verdict = by_rank([*made, *rows("by rank", 32, 1e-3, [0.8, 0.79])])
    assert verdict.holds
    assert verdict.parts[0].text.startswith("the gain is +9.8 points")
    assert not by_rank([*made, *rows("by rank", 32, 1e-3, [0.5, 0.5])]).holds


def test_an_export_may_lose_a_tenth_of_what_the_change_is_worth():
    def rows(*lost):
        return [{"case": "DeLoRA", "test": 0.7, "exported": {"8": 0.7 - d, "0": 0.5}} for d in lost]

    verdict = cut(rows(0.01, 0.01, 0.016), "digits")
    assert verdict.holds
    assert verdict.parts[0].text == "digits, 1 times the base rate: it loses 1.2 ± 0.2 of 20.0 points"
    assert not cut(rows(0.01, 0.01, 0.028), "digits").holds  # 1.6 in the mean, but not surely below 2
    assert not cut([*rows(0.0, 0.0), *(row | {"factor": 4.0} for row in rows(0.1, 0.1))], "digits").holds  # at one of two rates


def test_the_scores_of_exports_are_those_of_the_nearest_changes(base, tmp_path):
    """Of rank 4 a DeLoRA of rank 2 is exact, of rank 2 another, of rank 0 nothing is left."""
    model = delora.inject(copy.deepcopy(base), DeLoRA(r=2, lam=40.0), TARGETS)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.adapter.A.normal_()  # with one side alone the change has rank 2
            adapter.adapter.B.normal_()
    x, y = digits().test
    seen = {}

    def score(folder):
        seen[folder.name] = delora.load(copy.deepcopy(base), folder)(x)["logits"]
        return accuracy(model, x, y)

    row = exported(model, tmp_path, (4, 2), score)
    torch.testing.assert_close(seen["4"], model(x)["logits"], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(seen["2"], seen["4"], atol=1e-3)
    assert row["errors"]["4"] == 0 < row["errors"]["2"] < 1
    exported(model, tmp_path, (0,), score)
    torch.testing.assert_close(seen["0"], base(x)["logits"], atol=1e-5, rtol=1e-4)


def spoken(**other):
    kept = {"LoRA": (0.3, 30.0), "DoRA": (0.7, 50.0), "DeLoRA": (0.68, 22.0), "ETHER+": (0.7, 20.0)} | other
    rows = []
    for case, (test, perplexity) in kept.items():
        rows.append({"case": case, "test": 0.7, "perplexity": 20.0, "perplexity_before": 20.0})
        rows.append({"case": case, "factor": 4.0, "test": test, "perplexity": perplexity})
    return twice(rows)


def test_every_run_of_the_chat_study_is_the_recipe(tmp_path, monkeypatch):
    """The recipe of the stand-in trains each method at the rate that the study chose."""
    monkeypatch.chdir(claims.PAGE.resolve().parents[2])
    settings = {}
    for job in chat_study.robustness():
        run = chat_study.experiment(job, tmp_path)
        assert (run.train.lr, run.train.lam_lr, run.seed) == (job.lr, job.lr / 2, job.seed)
        if job.factor == 1 and job.seed == chat_study.SEEDS[0]:
            settings[job.case] = run
    assert [case for case, run in settings.items() if run.evaluate.before] == ["LoRA"]
    trained = {variant.name: run for variant, run in chat_study.read(chat_study.RECIPE, ["seeds=[10]"]).runs()}
    assert set(trained) == set(settings)
    for case, run in trained.items():
        assert (run.adapter.build(), run.train.lr, run.data) == (
            settings[case].adapter.build(),
            settings[case].train.lr,
            settings[case].data,
        )


def test_the_rule_for_the_chat_model():
    assert chat(spoken()).holds
    assert not chat(spoken(LoRA=(0.65, 30.0))).holds  # loses little, forgets little
    assert not chat(spoken(DeLoRA=(0.64, 20.0))).holds
    assert not chat(spoken(DeLoRA=(0.7, 31.0))).holds
    gone = [r for r in spoken() if r["case"] != "LoRA" or "factor" not in r]
    assert chat([*gone, *twice([{"case": "LoRA", "factor": 4.0}])]).holds  # diverged: chance, and all forgotten
