"""A plan as a person asked for it: what one replica reaches, how many a day of traffic needs, and what that costs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark.common.files import replacing_file
from dspark.common.plots import Panel, check_matplotlib, draw
from dspark.engine.profile import Profile
from dspark.simulation.arrivals import day_rates, read_trace
from dspark.simulation.capacity import Capacity, Goal, Load, highest_rate, measure_capacity
from dspark.simulation.fleet import FleetDay, simulate_fleet
from dspark.simulation.replica import Sizes
from dspark.simulation.validation import compare, read_load, summary
from dspark.speculation.round_trace import RoundTrace

Array = NDArray[np.float64]
DAY = 86400.0
USERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class PlanSettings:
    """What is planned."""

    profile: str
    trace: str
    policies: Sequence[str]
    sizes: Sizes
    goal: Goal
    peak: float  # arrivals per second at the busiest time of the day
    arrivals: str = "day"  # or "steady", or a CSV trace whose shape is scaled to the peak
    bins: int = 288  # stretches of the day
    replicas: int | None = None  # None: as many as the goal needs
    price: float = 0.0  # of a replica for an hour
    load: str | None = None  # a load.json to compare with
    seed: int = 0


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Everything the report says, as JSON holds it. Raises UserError for a goal that nobody can reach."""
    cost = Profile.load(settings.profile).cost
    trace = RoundTrace.load(settings.trace)
    sizes = _known_kinds(settings.sizes, trace)
    rate_B, stretch = rates(settings)
    result: dict[str, Any] = {"settings": asdict(settings), "policies": []}
    for policy in settings.policies:
        capacity = measure_capacity(cost, trace, policy, sizes, USERS)
        best = highest_rate(capacity, settings.goal)
        result["policies"].append(_fleet(settings, capacity, best, rate_B, stretch))
    if settings.load is not None:
        rows = compare(read_load(Path(settings.load)), cost, trace)
        result["validation"] = {"rows": rows, "summary": summary(rows)}
    return result


def rates(settings: PlanSettings) -> tuple[Array, float]:
    """Arrivals per second in each stretch, and the stretch's seconds."""
    if settings.arrivals == "day":
        return day_rates(settings.peak, settings.bins), DAY / settings.bins
    if settings.arrivals == "steady":
        return np.full(settings.bins, settings.peak), DAY / settings.bins
    trace = read_trace(Path(settings.arrivals))
    seconds = max(trace.seconds, 1e-9)
    counts = np.histogram(trace.times_N, bins=settings.bins, range=(0.0, seconds))[0].astype(float)
    return counts * settings.peak / counts.max(), seconds / settings.bins


def _known_kinds(sizes: Sizes, trace: RoundTrace) -> Sizes:
    """The sizes with all kinds of the trace in equal shares, where none are asked for."""
    return sizes if sizes.kinds else replace(sizes, kinds={kind: 1 / len(trace.kinds) for kind in trace.kinds})


def _fleet(settings: PlanSettings, capacity: Capacity, best: Load, rate_B: Array, stretch: float) -> dict[str, Any]:
    """One policy: its frontier, one replica at the goal, and the day on enough replicas."""
    needed = max(1, math.ceil(float(rate_B.max()) / best.rate))
    replicas = settings.replicas or needed
    day = simulate_fleet(capacity, rate_B, stretch, replicas=replicas, seed=settings.seed)
    hours = day.seconds / 3600
    tokens = day.served * capacity.mean_new
    return {
        "policy": capacity.policy,
        "points": [asdict(point) for point in capacity.points],
        "one_replica": asdict(best),
        "replicas_needed": needed,
        "replicas": replicas,
        "goal_kept": _kept(day, settings.goal),
        "cost_per_million_at_goal": settings.price / (best.throughput * 3600 / 1e6),
        "cost_per_million_of_the_day": settings.price * replicas * hours / max(tokens / 1e6, 1e-12),
        "day": {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in asdict(day).items()},
    }


def _kept(day: FleetDay, goal: Goal) -> bool:
    fast = goal.speed is None or day.speed_p5 >= goal.speed
    return fast and (goal.first_token is None or day.first_token_p95 <= goal.first_token)


def write_plan(result: dict[str, Any], out: Path) -> None:
    """simulation.json, simulation.md and the figures."""
    check_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    with replacing_file(out / "simulation.json") as fresh:
        fresh.write_text(json.dumps(result, indent=1), encoding="utf-8")
    policies = result["policies"]
    frontier = {p["policy"]: [(q["speed"], q["throughput"]) for q in p["points"]] for p in policies}
    draw(out / "frontier.png", [Panel("One replica", "tokens/s of one user", "tokens/s", frontier, whole_x=False)])
    hours = {p["policy"]: _by_hour(p["day"], "running_B") for p in policies}
    traffic = {"arrivals": _by_hour(policies[0]["day"], "rate_B")}
    day = [
        Panel("Traffic", "hour", "requests per second", traffic, whole_x=False),
        Panel("Load", "hour", "requests in a replica", hours, whole_x=False),
    ]
    draw(out / "day.png", day)
    with replacing_file(out / "simulation.md") as fresh:
        fresh.write_text(markdown(result), encoding="utf-8")


def _by_hour(day: dict[str, Any], column: str) -> list[tuple[float, float]]:
    values = day[column]
    return [((i + 0.5) * day["seconds"] / len(values) / 3600, value) for i, value in enumerate(values)]


def markdown(result: dict[str, Any]) -> str:
    """The report as text."""
    settings, goal = result["settings"], result["settings"]["goal"]
    promise = [f"{goal['speed']:g} tokens/s for 95 of 100 requests"] if goal["speed"] is not None else []
    if goal["first_token"] is not None:
        promise.append(f"the first token within {1000 * goal['first_token']:g} ms for 95 of 100")
    lines = ["# Fleet plan", "", f"Goal: {' and '.join(promise) or 'to keep up'}. "]
    lines[-1] += f"Peak: {settings['peak']:g} requests/s ({settings['arrivals']})."
    lines += ["", "## One replica at the goal, and the fleet", ""]
    lines += ["| policy | requests/s | tokens/s | running | replicas | goal kept | cost per million tokens |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for one in result["policies"]:
        best = one["one_replica"]
        lines.append(
            f"| {one['policy']} | {best['rate']:.2f} | {best['throughput']:.0f} | {best['running']:.1f} | "
            f"{one['replicas']} (needs {one['replicas_needed']}) | {'yes' if one['goal_kept'] else 'no'} | "
            f"{one['cost_per_million_of_the_day']:.4g} ({one['cost_per_million_at_goal']:.4g} when full) |"
        )
    lines += ["", "## The day", "", "| policy | requests | left | speed p5 | speed | first token ms | p95 ms |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for one in result["policies"]:
        day = one["day"]
        lines.append(
            f"| {one['policy']} | {day['served']:.0f} | {day['left']:.0f} | "
            f"{day['speed_p5']:.0f} | {day['speed']:.0f} | "
            f"{1000 * day['first_token']:.1f} | {1000 * day['first_token_p95']:.1f} |"
        )
    lines += ["", "![day](day.png)", "", "## Frontier of one replica", ""]
    lines += [
        "| policy | users | tokens/s | speed | speed p5 | first token ms | budget |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result["policies"]:
        for point in one["points"]:
            lines.append(
                f"| {one['policy']} | {point['users']} | {point['throughput']:.0f} | {point['speed']:.0f} | "
                f"{point['slow_speed']:.0f} | {1000 * point['first_token']:.1f} | {point['budget']:.2f} |"
            )
    lines += ["", "![frontier](frontier.png)", ""]
    return "\n".join(lines + _validated(result))


def _validated(result: dict[str, Any]) -> list[str]:
    if "validation" not in result:
        return []
    lines = [
        "## Against what was measured",
        "",
        "| users | policy | tokens/s | simulated | off | per user | simulated | off |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in result["validation"]["rows"]:
        speed = row["user_speed"] or math.nan
        lines.append(
            f"| {row['users']} | {row['policy']} | {row['throughput']:.0f} | {row['throughput_simulated']:.0f} | "
            f"{row['throughput_error']:+.1%} | {speed:.0f} | {row['user_speed_simulated']:.0f} | "
            f"{row['user_speed_error'] or math.nan:+.1%} |"
        )
    found = result["validation"]["summary"]
    lines += [
        "",
        f"Median error of throughput {found['throughput_median']:.1%}, of speed {found['user_speed_median']:.1%}; ",
    ]
    lines[-1] += (
        f"within 10 %: {found['throughput_within_10']:.0%} and {found['user_speed_within_10']:.0%} of the rows."
    )
    return [*lines, ""]
