"""Joins parts of a load sweep into one table: every policy at every size, and the default against its rivals.

python benchmarks/load_merge.py PART/load.json ... [--policy joint] [--baseline fixed:1] [--out DIR]

Parts are runs of `dspark bench load --out PART`, all policies in each, the sizes split among them. Ratios are medians
over rounds of neighbouring slices. `--baseline` is compared at the same total throughput; `--out` gets figures 7 and 8.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from dspark.evaluation.load_compare import against_best, by_kind, kind_table, matched
from dspark.evaluation.load_report import draw_load, read_rows, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--policy", default="joint")
    parser.add_argument("--baseline", default="fixed:1")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row for path in options.parts for row in read_rows(path) if "users" in row]
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(table(rows, "users"))
    for line in throughputs(rows, options.policy):
        print(line)
    if any(len(row.get("kinds", ())) > 1 for row in rows):
        console.print(kind_table(by_kind(rows)))
    print(f"\n{options.policy} against {options.baseline} at the same tokens/s in total:")
    for found in matched(rows, options.policy, options.baseline):
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        draw_load(options.out, rows)


def throughputs(rows: list[dict], policy: str) -> list[str]:
    """A Markdown table of tokens/s, with the policy over the best of none and every fixed length."""
    names = list(dict.fromkeys(row["policy"] for row in rows))
    by = {(row["users"], row["policy"]): row["throughput"] for row in rows}
    lines = ["| users | " + " | ".join(names) + f" | {policy} / best |", "|---" * (len(names) + 2) + "|"]
    for found in against_best(rows, policy):
        cells = [f"{by.get((found['users'], name), 0):.0f}" for name in names]
        ratio = f"{found['ratio']:.3f} ({found['best']})"
        lines.append(f"| {found['users']} | " + " | ".join(cells) + f" | {ratio} |")
    return lines


if __name__ == "__main__":
    main()
