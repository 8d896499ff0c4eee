"""Which figures an evaluation's numbers give, and their curves. (DSpark, §4 and §5)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark.common.plots import Panel, Points, draw

ENOUGH = 20  # samples: a bin or position with fewer is left out of a figure


def draw_figures(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Every figure the numbers allow, over all tasks together; returns the files."""
    drafters = list(result["drafters"])
    panels = {
        "acceptance_by_position": acceptance_panels(result, drafters),
        "threshold_sweep": threshold_panels(result, drafters),
        "reliability": reliability_panels(result, drafters),
        "by_gamma": gamma_panels(result, drafters),
        "by_depth": depth_panels(result, drafters),
    }
    files = []
    for name, found in panels.items():
        if found:
            files.append(directory / f"{name}.png")
            draw(files[-1], found)
    return files


def ways(result: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """One drafter's numbers on every task."""
    return [task["ways"][name] for task in result["tasks"].values()]


def acceptance_panels(result: Mapping[str, Any], drafters: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Conditional acceptance by position, a panel for each task up to three, else of all together."""
    tasks = {name: [task] for name, task in result["tasks"].items()}
    if len(tasks) > 3:
        tasks = {f"{len(tasks)} tasks together": list(result["tasks"].values())}
    x, y = "position in the block", "accepted, given the prefix"
    return [
        Panel(
            title,
            x,
            y,
            {one["name"]: by_position([task["ways"][one["name"]] for task in group]) for one in drafters},
            low=0.0,
            high=1.0,
        )
        for title, group in tasks.items()
    ]


def by_position(found: Sequence[Mapping[str, Any]]) -> Points:
    """Conditional acceptance at each 1-based position, over all rounds of several measurements."""
    points = []
    for k in range(max((len(one["reached_at"]) for one in found), default=0)):
        pairs = [
            (one["reached_at"][k], one["conditional_acceptance"][k] or 0.0)
            for one in found
            if k < len(one["reached_at"])
        ]
        reached = sum(count for count, _ in pairs)
        if reached >= ENOUGH:
            points.append((float(k + 1), sum(count * share for count, share in pairs) / reached))
    return points


def threshold_panels(result: Mapping[str, Any], drafters: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Acceptance rate and τ by confidence threshold, means over tasks."""
    curves: dict[str, dict[str, Points]] = {"acceptance_rate": {}, "tau": {}}
    for one in drafters:
        rows = [way["thresholds"] for way in ways(result, one["name"]) if way.get("thresholds")]
        for field, found in curves.items():
            points = [(at[0]["threshold"], [p[field] for p in at]) for at in zip(*rows, strict=True)]
            found[one["name"]] = [(x, sum(values) / len(values)) for x, values in points if None not in values]
    if not any(curves["tau"].values()):
        return []
    x = "confidence threshold"
    return [
        Panel(
            "acceptance rate", x, "accepted / verified", curves["acceptance_rate"], whole_x=False, low=0.0, high=1.02
        ),
        Panel("tokens per round", x, "τ", curves["tau"], whole_x=False, low=1.0),
    ]


def reliability_panels(result: Mapping[str, Any], drafters: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Reliability diagrams of c_k where it was asked, and of a_γ: what was said beside what was accepted."""
    panels = []
    for kind, title in (("conditional", "confidence of a token"), ("survival", "survival of a prefix")):
        curves = {}
        for one in drafters:
            found = [way["reliability"][kind] for way in ways(result, one["name"]) if way.get("reliability")]
            points = pooled([bin_ for task in found for scores in task for bin_ in scores["bins"]])
            if points:
                curves[one["name"]] = points
        if curves:
            panels.append(
                Panel(title, "predicted", "accepted", curves, whole_x=False, diagonal=True, low=0.0, high=1.0)
            )
    return panels


def pooled(bins: Sequence[Mapping[str, float]], parts: int = 20) -> Points:
    """Bins of several sets as one set's, by the samples in each."""
    sums = [[0.0, 0.0, 0.0] for _ in range(parts)]
    for one in bins:
        part = sums[min(int(one["mean"] * parts), parts - 1)]
        part[0] += one["count"]
        part[1] += one["count"] * one["mean"]
        part[2] += one["count"] * one["accepted"]
    return [(mean / count, accepted / count) for count, mean, accepted in sums if count >= ENOUGH]


def gamma_panels(result: Mapping[str, Any], drafters: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """τ and a step's milliseconds by γ, for drafters that were measured at several."""
    return _along(result, drafters, "gamma", "γ, tokens drafted", ("label",), with_latency=True)


def depth_panels(result: Mapping[str, Any], drafters: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """τ by depth, for kinds of drafter that were measured at several."""
    return _along(result, drafters, "layers", "layers", ("kind", "gamma"), with_latency=False)


def _along(
    result: Mapping[str, Any],
    drafters: Sequence[Mapping[str, Any]],
    axis: str,
    x: str,
    group: tuple[str, ...],
    *,
    with_latency: bool,
) -> list[Panel]:
    tau: dict[str, list[tuple[float, float]]] = {}
    latency: dict[str, list[tuple[float, float]]] = {}
    for one in drafters:
        mean = result["average"][one["name"]]["tau"]
        if one[axis] is None or mean is None:
            continue
        name = " γ=".join(str(one[field]) for field in group)
        rows = ways(result, one["name"])
        tau.setdefault(name, []).append((one[axis], mean))
        latency.setdefault(name, []).append((one[axis], sum(row["step_ms"] for row in rows) / len(rows)))
    kept = [name for name, points in tau.items() if len({at for at, _ in points}) > 1]
    if not kept:
        return []
    panels = [Panel("tokens per round", x, "τ, mean over tasks", {name: sorted(tau[name]) for name in kept})]
    if with_latency:
        panels.append(
            Panel("time of a step", x, "milliseconds", {name: sorted(latency[name]) for name in kept}, low=0.0)
        )
    return panels
