"""What a load test says about its policies: each against the best, by kind of request, and at the same throughput."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

Rows = Sequence[dict[str, Any]]
"""Rows of a load.json."""


def ratio_of_rounds(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """The median of what each round says, for its slices are neighbours in time; None without a round of both."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a and b]
    return median(a / b for a, b in pairs) if pairs else None


def against_best(rows: Rows, policy: str) -> list[dict[str, Any]]:
    """At each number of users the policy's throughput over that of the best of no speculation and all fixed lengths."""
    found = []
    for users, here in _by_users(rows).items():
        rivals = [row for name, row in here.items() if name == "none" or name.startswith("fixed:")]
        if policy not in here or not rivals:
            continue
        best = max(rivals, key=lambda row: row["throughput"])
        ratio = ratio_of_rounds(here[policy]["throughput_rounds"], best["throughput_rounds"])
        found.append({"users": users, "best": best["policy"], "ratio": ratio})
    return found


def by_kind(rows: Rows) -> list[dict[str, Any]]:
    """Every policy's speed to the users of each kind, and over that without speculation beside it."""
    found = []
    for users, here in _by_users(rows).items():
        for name, row in here.items():
            for kind, speeds in row.get("kinds", {}).items():
                plain = here.get("none", {}).get("kinds", {}).get(kind, {}).get("user_speed_rounds", ())
                ratio = ratio_of_rounds(speeds["user_speed_rounds"], plain)
                line = {"users": users, "kind": kind, "policy": name, "over_none": ratio}
                found.append(line | {"user_speed": speeds["user_speed"], "throughput": row["by_kind"].get(kind)})
    return sorted(found, key=lambda line: (line["users"], line["kind"]))


def matched(rows: Rows, policy: str, baseline: str) -> list[dict[str, Any]]:
    """Speeds of one user where both policies reach the same total throughput, by interpolation along their frontiers.

    At every throughput that one of them was measured at and both reach.
    """
    ours, theirs = frontier(rows, policy), frontier(rows, baseline)
    if not ours or not theirs:
        return []
    low, high = max(ours[0][0], theirs[0][0]), min(ours[-1][0], theirs[-1][0])
    found = []
    for total in sorted({total for total, _ in [*ours, *theirs] if low <= total <= high}):
        mine, other = _at(total, ours), _at(total, theirs)
        found.append({"throughput": total, "user_speed": mine, "baseline": other, "ratio": mine / other})
    return found


def frontier(rows: Rows, policy: str) -> list[tuple[float, float]]:
    """(total throughput, speed of one user) by rising throughput: points that no other one beats in both."""
    points = [(row["throughput"], row["user_speed"]) for row in rows if row["policy"] == policy and row["user_speed"]]
    return sorted(p for p in points if not any(q[0] > p[0] and q[1] > p[1] for q in points))


def _at(total: float, line: Sequence[tuple[float, float]]) -> float:
    return float(np.interp(total, [point[0] for point in line], [point[1] for point in line]))


def kind_table(lines: Rows) -> Table:
    """`by_kind` for a person."""
    shown = Table("users", "kind", "policy", "tokens/s", "per user", "x none")
    for number, line in enumerate(lines):
        last = number + 1 == len(lines) or lines[number + 1]["users"] != line["users"]
        cells = (_number(line["throughput"], 0), _number(line["user_speed"], 0), _number(line["over_none"], 3))
        shown.add_row(str(line["users"]), line["kind"], line["policy"], *cells, end_section=last)
    return shown


def _by_users(rows: Rows) -> dict[int, dict[str, dict[str, Any]]]:
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in sorted((row for row in rows if "users" in row), key=lambda row: row["users"]):
        found.setdefault(row["users"], {})[row["policy"]] = row
    return found


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
