"""Figures from plain rows: what is drawn is what the rows say, and hostile names are only text."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from delora.reports import figures

HOSTILE = "_a $x_{1$ <b>"


def rows(case="LoRA", seeds=(0, 1, 2), factors=(0.5, 1.0, 2.0)):
    return [
        {"case": case, "factor": f, "step": 10 * f, "score": 0.5 + 0.1 * s, "distance": f * (1 + s), "bound": 9.0}
        for s in seeds
        for f in factors
    ]


def test_means_over_the_seeds_in_order_of_the_factor():
    figure = figures.over_rates(rows()[::-1], ["LoRA"])
    left, right = figure.axes
    assert list(left.lines[0].get_xdata()) == [0.5, 1.0, 2.0]
    assert list(left.lines[0].get_ydata()) == pytest.approx([60.0] * 3)  # per cent
    assert list(right.lines[0].get_ydata()) == pytest.approx([1.0, 2.0, 4.0])


def test_a_line_ends_where_a_seed_diverged():
    data = rows()
    del data[5]["score"]  # of the second seed at factor 2
    left, right = figures.over_rates(data, ["LoRA"]).axes
    assert list(left.lines[0].get_xdata()) == [0.5, 1.0]
    assert left.lines[1].get_marker() == "x"
    assert len(right.lines) == 1


def test_the_bound_is_drawn_for_the_case_that_has_one():
    data = rows() + rows("DeLoRA")
    with_bound = figures.over_steps(data, ["LoRA", "DeLoRA"], bound="DeLoRA").axes[0]
    assert [line.get_label() for line in with_bound.lines] == ["LoRA", "DeLoRA", "bound of DeLoRA"]
    assert set(with_bound.lines[2].get_ydata()) == {9.0}
    both = figures.over_steps([r | {"reachable": 4.0} for r in data], ["LoRA", "DeLoRA"], bound="DeLoRA").axes[0]
    assert both.lines[-1].get_label() == "reachable size of DeLoRA"
    assert set(both.lines[-1].get_ydata()) == {4.0}


def test_the_profile_of_column_norms():
    model = nn.ModuleDict({f"layer{i}": nn.ModuleDict({"q": nn.Linear(3, 4), "v": nn.Linear(3, 4)}) for i in range(2)})
    with torch.no_grad():
        for i in range(2):
            model[f"layer{i}"].q.weight.fill_(i + 1)  # columns of four equal entries: norm 2 (i + 1)
            model[f"layer{i}"].v.weight.zero_()
    (axes,) = figures.column_norm_profile(model, [f"layer{i}.{kind}" for kind in "qv" for i in range(2)]).axes
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {"q": [2.0, 4.0], "v": [0.0, 0.0]}


def test_what_has_no_score_has_no_panel_of_scores():
    data = [{k: v for k, v in r.items() if k != "score"} for r in rows("LoRA")]
    assert [a.get_ylabel() for a in figures.over_steps(data, ["LoRA"], distance="far").axes] == ["far"]
    assert len(figures.over_steps(rows("LoRA"), ["LoRA"]).axes) == 2


def test_a_grid_has_its_values_in_place_and_frames():
    cells = {"a": {(1.0, 10.0): 0.25, (2.0, 10.0): 0.5, (1.0, 20.0): 1.0}}
    axes = figures.grids(cells, "x", "y", "value", {"a": {(2.0, 10.0)}}).axes[0]
    table = axes.images[0].get_array().filled(math.nan)
    assert table[0].tolist() == [25.0, 50.0]
    assert table[1][0] == 100.0
    assert math.isnan(table[1][1])
    assert [patch.get_xy() for patch in axes.patches] == [(0.5, -0.5)]


@pytest.mark.parametrize("case", [HOSTILE, "plain", "\\frac"])
def test_files_are_whole_and_the_same_again(tmp_path, case):
    for folder in "ab":
        figures.save(figures.over_rates(rows(case), [case]), tmp_path / folder / "figure")
        figures.save(figures.over_steps(rows(case), [case], bound=case), tmp_path / folder / "steps")
    for name, start in (("figure.png", b"\x89PNG"), ("figure.pdf", b"%PDF"), ("steps.png", b"\x89PNG")):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in "ab")
        assert first.startswith(start)
        assert first == second


def test_a_tradeoff_goes_through_its_points_in_their_order():
    curves = {"DeLoRA": [(90.0, 5.0, "0"), (40.0, 60.0, HOSTILE), (10.0, 30.0, "2")], "LoRA": [(90.0, 5.0, "0")]}
    figure = figures.tradeoff(curves, "kept", "gained")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert {line.get_label(): list(line.get_xdata()) for line in axes.lines} == {"DeLoRA": [90, 40, 10], "LoRA": [90]}
    assert [text.xy for text in axes.texts] == [(x, y) for points in curves.values() for x, y, _ in points]
    left, right = figures.tradeoff(curves, "perplexity", "gained", logarithmic=True).axes[0].get_xlim()
    assert left > right  # less of a perplexity is better, and stands on the right
