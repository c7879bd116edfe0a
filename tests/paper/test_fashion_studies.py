"""The studies of subjects and maps: which runs, what is chosen by what, what a run keeps, how it is judged."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from delora.tasks import read
from paper.standins import fashion as clothes
from paper.standins import prepare
from paper.studies import engine, fashion
from paper.studies.fashion import Job, best, experiment, trace
from paper.studies.verdicts import NO, YES, on_new_views, on_subjects

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_no_subject_both_chooses_and_judges():
    choosing = {job.subject for study in ("methods-tuning", "ladder-tuning") for job in fashion.STUDIES[study]()}
    assert choosing == set(clothes.CHOOSING)
    assert choosing.isdisjoint(fashion.SUBJECTS)
    assert {*choosing, *fashion.SUBJECTS} < set(clothes.SUBJECTS)
    assert {*clothes.VIEWED, *fashion.SUBJECTS} == set(clothes.SUBJECTS)
    assert set(clothes.VIEWED).isdisjoint(fashion.SUBJECTS)
    assert {job.subject for job in fashion.STUDIES["views-choose"]()} == set(clothes.VIEWED)
    assert set(fashion.VIEW_SEEDS).isdisjoint(fashion.VIEW_JUDGED_SEEDS)
    assert fashion.TUNING_SEED not in fashion.SEEDS


def test_every_setting_is_a_recipe(tmp_path):
    for study in ("methods-tuning", "ladder-tuning"):
        by_setting = {json.dumps(job.adapter): job for job in fashion.STUDIES[study]()}
        for job in by_setting.values():
            settings = experiment(job, tmp_path)
            assert (settings.train.lr, settings.train.lam_lr, settings.seed) == (job.lr, job.lam_lr, job.seed)
            assert settings.adapter.method == job.adapter["method"]
            assert settings.task == ("semantic_map" if job.subject is None else "subject")


def test_the_best_setting_is_that_of_both_subjects(tmp_path, monkeypatch):
    scores = {(1e-3, "a"): 0.9, (1e-3, "b"): 0.1, (1e-2, "a"): 0.6, (1e-2, "b"): 0.6}
    rows = [{"case": "x", "adapter": {"r": 1}, "lr": lr, "subject": s, "test": v} for (lr, s), v in scores.items()]
    rows += [{"case": "x", "adapter": {"r": 2}, "lr": 1e-1, "subject": s} for s in "ab"]  # diverged
    monkeypatch.setattr(engine, "read", lambda study, results: rows)
    assert best("study", ["x"]) == {"x": ({"r": 1}, 1e-2)}


@pytest.mark.parametrize("recipe", ["fashion-methods", "fashion-ladder", "fashion-maps"])
def test_the_recipes_are_what_the_studies_chose(recipe):
    runs = {v.name: run for v, run in read(ROOT / "paper/standins/recipes" / f"{recipe}.toml", ["seeds=[10]"]).runs()}
    chosen = best("methods-tuning", fashion.METHODS)
    if recipe != "fashion-methods":  # "DeLoRA: + weight norms (L2)"
        runs = {name.partition("(")[2].rstrip(")"): run for name, run in runs.items()}
        chosen = {"L0": chosen["LoRA"]} | best("ladder-tuning", fashion.LADDER)
    assert set(runs) == set(chosen)
    for case, (adapter, lr) in chosen.items():
        subject = None if recipe == "fashion-maps" else "striped_boot"
        run = experiment(Job("study", case, adapter, lr, lr * fashion.LAM_SHARE, 10, subject), Path("runs"))
        assert (runs[case].adapter.build(), runs[case].train.lr) == (run.adapter.build(), lr)
        assert runs[case].adapter.targets == run.adapter.targets
        if "lam" in adapter:
            assert runs[case].train.lam_lr == run.train.lam_lr
        kind = "semantic_map" if recipe == "fashion-maps" else "subject"
        assert getattr(runs[case], kind) == getattr(run, kind)


def test_the_trace_has_every_hundredth_step(tmp_path):
    rows = [{"step": s, "distance": s / 1000, "bound_used": 0.5, "reach": 0.1} for s in range(20, 321, 20)]
    rows.append({"step": 320, "validation_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert trace(tmp_path) == [{"step": s, "distance": s / 1000, "bound": s / 500, "reachable": 0.1} for s in (100, 200, 300)]


def made(case, factor, test, distance=1.0, seed=10, **other):
    return {"case": case, "factor": factor, "test": test, "distance": distance, "seed": seed, **other}


def test_what_is_not_there_is_not_judged():
    assert on_subjects(lambda study: []) == {}


def test_factor_one_is_that_of_the_sweeps_own_seeds():
    """The mean of the base over seeds 10 and 12; the third seed, which no sweep has, would make LoRA lose less."""
    sweep = [
        made(case, f, 0.3 if case in ("LoRA", "DoRA") else 0.8, seed=s, bound_used=0.1)
        for case in ("LoRA", "DoRA", "DoRA, fixed magnitude", "ETHER+", "DeLoRA")
        for f in (4.0, 8.0, 16.0)
        for s in (10, 12)
    ]
    base = [
        {k: v for k, v in made(case, 1.0, 0.8 if s != 11 else 0.0, seed=s).items() if k != "factor"}
        for case in ("LoRA", "DoRA", "DoRA, fixed magnitude", "ETHER+", "DeLoRA", "OFT")
        for s in (10, 11, 12)
    ]
    studies = {"methods": base, "robustness": sweep}
    judged = on_subjects(lambda study: studies.get(study, []))
    assert set(judged) == {"R1", "R2", "R3"}
    assert judged["R1"].holds
    assert "LoRA loses 50.0 ± 0.0 points" in judged["R1"].parts[0].text


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Experiments that draw few pictures, in a folder of their own."""
    prepare.main()
    monkeypatch.setattr(fashion, "SHARED", tmp_path / "shared")
    monkeypatch.setattr(fashion, "RESULTS", tmp_path / "results")

    def few(job, out, real=experiment):
        settings = real(job, out)
        pictures = settings.subject.model_copy(update={"class_images": 2, "images": 1, "steps": 2})
        return settings.model_copy(update={"subject": pictures})

    monkeypatch.setattr(fashion, "experiment", few)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_run_on_a_subject_is_kept_with_its_score(tmp_path):
    """Two steps with the shipped model and the real judges; the row has the score's parts, and it is not run again."""
    job = Job("study", "LoRA", fashion.LORA, 1e-3, 1e-3, 3, "striped_boot", steps=2)
    row = fashion.work(job)
    near = (row["dino"] - row["dino_untuned"]) / (row["dino_real"] - row["dino_untuned"])
    assert row["subject_share"] == pytest.approx(near)
    assert row["test"] == pytest.approx((near + row["prompt"]) / 2)
    assert fashion.snapshot_file("LoRA").is_file()
    tmp_path.joinpath("study.jsonl").write_text(json.dumps(engine.short(row)) + "\n")
    screen = io.StringIO()
    engine.run("study", [job, replace(job)], fashion.work, tmp_path, Console(file=screen))
    assert "1 runs are there, 0 to do" in screen.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_new_views_are_measured_against_the_base_model():
    """A run at rate 0 is no better than the base model on them; no judge is asked; a run that learns changes the error."""
    job = Job("views-choose", "LoRA", fashion.LORA, 0.0, 0.0, 3, "ringed_coat", steps=2)
    still, moved = fashion.work(job), fashion.work(replace(job, lr=1e-2))
    assert "test" not in still
    assert still[fashion.NEW] == 0.0
    assert moved[fashion.NEW] != 0.0


def test_on_new_views_each_start_is_judged_against_lora():
    """Two points above LoRA with a standard error of a tenth: yes; two below: no, and the claim fails with it."""
    cases = {"LoRA": (0.5, 0.1), "DeLoRA": (0.52, 0.12), "DeLoRA, soft": (0.48, 0.1)}
    rows = [
        made(case, 1.0, score + 0.001 * (seed - 11), seed=seed, subject=name, new_views=views)
        for case, (score, views) in cases.items()
        for seed in (10, 11, 12)
        for name in "abc"
    ]
    verdict = on_new_views(rows)
    assert [part.outcome for part in verdict.parts] == [YES, NO]
    assert verdict.outcome == "fails"
    assert "on new views DeLoRA less LoRA: 2.0 ± 0.0 points" in verdict.notes[0]
