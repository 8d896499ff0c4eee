"""An evaluation as Markdown: one table for a question, drafters in rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dspark.evaluation.figures import ways
from dspark.evaluation.suite import PLAIN


def report(result: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """The whole text; `figures` are file names beside it."""
    settings, where = result["settings"], result["where"]
    parts = [
        f"# Evaluation of {settings['target']}",
        f"{where['device']}; dspark {where['dspark']}, torch {where['torch']}, commit {where['commit']}. "
        f"Temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, up to {settings['max_tokens']} tokens "
        f"a turn, plan {settings['planner']}, {settings['batch']} conversations at once, medians of "
        f"{settings['rounds']} rounds in turns.",
        "## Tokens per round, τ",
        by_task(result, "tau", "{:.2f}"),
        "## Speed",
        f"Tokens per second of all conversations, and how many times plain decoding's.\n\n{speed(result)}",
        "## Acceptance rate",
        f"Accepted of verified tokens.\n\n{by_task(result, 'acceptance_rate', '{:.1%}')}",
        "## Acceptance by position, given the prefix",
        positions(result),
        "## Confidence",
        "Of rounds that were verified in full: a token's confidence where it was reached, and the survival of the "
        f"prefix up to it; means over tasks, by their samples.\n\n{confidences(result)}",
        *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figures),
    ]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Markdown; the first `texts` columns are text, the others numbers."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: float | None, form: str) -> str:
    """A number, or a dash for one that does not exist."""
    return "-" if value is None else form.format(value)


def names(result: Mapping[str, Any]) -> list[str]:
    """The drafters, in the order they were given."""
    return [one["name"] for one in result["drafters"]]


def by_task(result: Mapping[str, Any], field: str, form: str) -> str:
    """One number of every drafter on every task, and its mean."""
    rows = [
        [name, *(shown(way[field], form) for way in [*ways(result, name), result["average"][name]])]
        for name in names(result)
    ]
    return table(["", *result["tasks"], "mean"], rows)


def speed(result: Mapping[str, Any]) -> str:
    """Tokens per second and speed-up on every task."""
    rows = []
    for name in [PLAIN, *names(result)]:
        found = [*ways(result, name), result["average"][name]]
        rows.append([name, *(f"{way['tokens_per_second']:.0f} ({way['speed_up']:.2f} ×)" for way in found)])
    return table(["", *result["tasks"], "mean"], rows)


def positions(result: Mapping[str, Any]) -> str:
    """Conditional acceptance of every drafter and task."""
    rows = [
        [name, task, *(shown(value, "{:.2f}") for value in found["ways"][name]["conditional_acceptance"])]
        for name in names(result)
        for task, found in result["tasks"].items()
    ]
    longest = max((len(row) - 2 for row in rows), default=0)
    header = ["", "task", *(str(k + 1) for k in range(longest))]
    return table(header, [row + ["-"] * (longest + 2 - len(row)) for row in rows], texts=2)


def confidences(result: Mapping[str, Any]) -> str:
    """ECE, AUROC and Brier score of every drafter and position."""
    rows = []
    for name in names(result):
        found = [way["reliability"] for way in ways(result, name) if way.get("reliability")]
        for k in range(max((len(scores["survival"]) for scores in found), default=0)):
            at = {kind: [s[kind][k] for s in found if k < len(s[kind])] for kind in ("conditional", "survival")}
            cells = [str(sum(scores["samples"] for scores in at["conditional"]))]
            cells += [shown(weighted(at["conditional"], field), "{:.2f}") for field in ("mean", "accepted")]
            cells += [shown(weighted(at[kind], f), "{:.3f}") for kind in at for f in ("ece", "auroc", "brier")]
            rows.append([name, str(k + 1), *cells])
    header = ["", "position", "samples", "said", "accepted", "ECE", "AUROC", "Brier"]
    return table([*header, "survival ECE", "AUROC", "Brier"], rows)


def weighted(scores: Sequence[Mapping[str, Any]], field: str) -> float | None:
    """A score's mean over tasks, by their samples."""
    known = [(one[field], one["samples"]) for one in scores if one[field] is not None]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None
