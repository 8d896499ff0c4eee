"""Figures appear for what was measured, small and with the right numbers in them."""

import pytest

from dspark.common import plots
from dspark.common.errors import UserError
from dspark.common.plots import Panel, draw
from dspark.evaluation.calibrate import SHOWN, drawn
from dspark.evaluation.figures import acceptance_panels, draw_figures, gamma_panels, pooled, reliability_panels


def way(tau, share):
    bins = [{"mean": 0.3, "accepted": share, "count": 30}, {"mean": 0.9, "accepted": 0.9, "count": 5}]
    scores = [{"bins": bins}]
    return {
        "conditional_acceptance": [share, share / 2, 1.0],
        "reached_at": [100, 50, 3],
        "thresholds": [{"threshold": t / 4, "tau": tau - t / 8, "acceptance_rate": 0.5 + t / 8} for t in range(3)],
        "reliability": {"conditional": scores, "survival": scores},
        "step_ms": 2.0 + tau,
    }


def result():
    shapes = [("a", 2, 4), ("a", 2, 7), ("b", 5, 7)]
    drafters = [
        {"name": f"{label}{layers}{gamma}", "label": label, "kind": "dspark", "layers": layers, "gamma": gamma}
        for label, layers, gamma in shapes
    ]
    tasks = {
        task: {"ways": {one["name"]: way(2 + one["gamma"] / 10, share) for one in drafters}}
        for task, share in (("code", 0.8), ("prose", 0.6))
    }
    average = {one["name"]: {"tau": 2 + one["gamma"] / 10} for one in drafters}
    return {"drafters": drafters, "tasks": tasks, "average": average}


def test_all_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 60)  # quicker
    files = draw_figures(result(), tmp_path)
    names = ["acceptance_by_position", "threshold_sweep", "reliability", "by_gamma", "by_depth"]
    assert [path.stem for path in files] == names
    for path in files:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 60_000
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}, "half a file was left"


def test_curves_hold_the_numbers():
    found = result()
    code, prose = acceptance_panels(found, found["drafters"])
    assert code.title == "code" and code.curves["a24"] == [(1, 0.8), (2, 0.4)]  # position 3 has three samples
    assert prose.curves["b57"][0] == (1, 0.6)
    tau, latency = gamma_panels(found, found["drafters"])
    assert tau.curves == {"a": [(4, 2.4), (7, 2.7)]}  # b was measured at one γ
    assert latency.curves["a"] == [(4, pytest.approx(4.4)), (7, pytest.approx(4.7))]
    [conditional, _] = reliability_panels(found, found["drafters"])
    assert conditional.curves["a24"] == [(pytest.approx(0.3), pytest.approx(0.7))]


def test_bins_are_pooled_by_their_samples():
    bins = [{"mean": 0.52, "accepted": 1.0, "count": 30}, {"mean": 0.54, "accepted": 0.0, "count": 10}]
    assert pooled(bins) == [(pytest.approx(0.525), pytest.approx(0.75))]


def test_without_matplotlib_one_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"dspark\[plot\]"):
        plots.check_matplotlib()
    with pytest.raises(UserError, match="matplotlib"):
        draw(tmp_path / "x.png", [Panel("t", "x", "y", {"a": [(0, 1)]})])
    assert not list(tmp_path.iterdir())


def test_a_point_of_a_few_rounds_is_not_drawn():
    bins = [[0.05, 1.0, 2], [0.3, 0.25, SHOWN], [0.6, 0.7, SHOWN - 1], [0.9, 0.8, 400]]
    assert drawn(bins) == [(0.3, 0.25), (0.9, 0.8)]
