"""The simulator beside what `bench load` measured: the same users, lengths and planners, from the same profile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark.common.errors import UserError
from dspark.simulation.capacity import measure_capacity
from dspark.simulation.replica import Sizes
from dspark.speculation.cost import StepCost
from dspark.speculation.round_trace import RoundTrace


def sizes_of(workload: dict[str, Any]) -> Sizes:
    """The lengths and kinds of a load test."""
    noise = float(workload.get("noise", 0.0))
    kinds = {kind: share for kind, share in (("code", 1 - noise), ("noise", noise)) if share > 0}
    return Sizes(tuple(workload["prompt_tokens"]), tuple(workload["new_tokens"]), kinds)


def read_load(path: Path) -> dict[str, Any]:
    """A load.json. Raises UserError for another file."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        workload, rows = held["settings"]["workload"], held["rows"]
        sizes_of(workload)
        return {"workload": workload, "rows": [row for row in rows if "users" in row]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of dspark bench load; pass its load.json") from error


def compare(load: dict[str, Any], cost: StepCost, trace: RoundTrace) -> list[dict[str, Any]]:
    """Measured and simulated throughput and speed per user, row by row."""
    sizes = sizes_of(load["workload"])
    rows = []
    for policy in dict.fromkeys(row["policy"] for row in load["rows"]):
        measured = {row["users"]: row for row in load["rows"] if row["policy"] == policy}
        capacity = measure_capacity(cost, trace, policy, sizes, sorted(measured))
        for point in capacity.points:
            real = measured[point.users]
            rows.append(
                {
                    "users": point.users,
                    "policy": policy,
                    "throughput": real["throughput"],
                    "throughput_simulated": point.throughput,
                    "throughput_error": point.throughput / real["throughput"] - 1,
                    "user_speed": real["user_speed"],
                    "user_speed_simulated": point.speed,
                    "user_speed_error": point.speed / real["user_speed"] - 1 if real["user_speed"] else None,
                    "budget": real["budget"],
                    "budget_simulated": point.budget,
                }
            )
    return sorted(rows, key=lambda row: (row["users"], row["policy"]))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far off the simulator is: median and largest relative error, and the share within 10 %."""
    found: dict[str, float] = {}
    for name in ("throughput", "user_speed"):
        error = np.abs([row[f"{name}_error"] for row in rows if row[f"{name}_error"] is not None])
        found[f"{name}_median"] = float(np.median(error))
        found[f"{name}_most"] = float(error.max())
        found[f"{name}_within_10"] = float((error <= 0.1).mean())
    return found
