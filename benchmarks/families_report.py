"""Tables and figures of `families.py`, from whatever runs are finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dspark.common.files import replacing_file
from dspark.common.plots import Panel, Points, draw
from dspark.evaluation.figures import by_position, pooled
from dspark.evaluation.markdown import shown, table, weighted

NAMES = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "Eagle-3", "dflash_l1": "DFlash, DSpark's loss"}
DEPTHS = {"dspark": 2, "dflash": 2, "eagle3": 1, "dflash_l1": 2}
DOMAINS = ("code", "prose")
Result = dict[str, Any]


def write_report(out: Path) -> None:
    """report.md, families.json and the figures, from every result.json under `out`."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("runs/*/result.json"))]
    if not results:
        print("no run is finished yet")
        return
    lengths = sorted({r["steps"] for r in results})
    alike = {steps: [r for r in results if r["steps"] == steps] for steps in lengths}
    most = max(alike.values(), key=len)
    parts = [
        f"{results[0]['where']['device']}, commits {', '.join(sorted({str(r['where']['commit']) for r in results}))}.",
        *(
            part
            for steps, found in alike.items()
            for part in (
                f"## {steps} steps, γ = 7: τ, mean over seeds (lowest..highest)",
                main_table(found),
                gains(found),
            )
        ),
        "## τ by steps, γ = 7, seed 1",
        along(results, "steps", lambda r: r["gamma"] == 7 and r["seed"] == 1 and r["layers"] == DEPTHS[r["family"]]),
        f"## τ by γ, 2 layers, seed 1, {most[0]['steps']} steps",
        along(most, "gamma", lambda r: r["layers"] == 2 and r["seed"] == 1),
        f"## τ by depth, γ = 7, {most[0]['steps']} steps",
        along(most, "layers", lambda r: r["gamma"] == 7),
        f"## Confidence of DSpark, γ = 7, 2 layers, {lengths[-1]} steps: mean over positions, weighted by samples",
        confidence(alike[lengths[-1]]),
    ]
    files = {"report.md": "\n\n".join(parts) + "\n", "families.json": json.dumps(results, indent=1) + "\n"}
    for name, text in files.items():
        with replacing_file(out / name) as fresh:
            fresh.write_text(text, encoding="utf-8")
    figures(most, out)
    print(files["report.md"])


def chosen(results: Sequence[Result], family: str, layers: int | None = None, gamma: int = 7) -> list[Result]:
    """All seeds of one family and shape."""
    return [r for r in results if (r["family"], r["gamma"]) == (family, gamma) and layers in (None, r["layers"])]


def macro(result: Result) -> float:
    """τ, both domains counted alike."""
    return mean(result["domains"][domain]["tau"] for domain in DOMAINS)


def spread(values: Sequence[float]) -> str:
    """Mean and extremes."""
    return f"{mean(values):.3f} ({min(values):.3f}..{max(values):.3f})" if len(values) > 1 else f"{values[0]:.3f}"


def main_table(results: Sequence[Result]) -> str:
    """Families and depths at γ = 7 in rows."""
    rows = []
    for family, layers in sorted({(r["family"], r["layers"]) for r in results if r["gamma"] == 7}):
        found = chosen(results, family, layers)
        rows.append(
            [
                f"{NAMES[family]}, {layers} layer{'s' if layers > 1 else ''}",
                *(spread([r["domains"][domain]["tau"] for r in found]) for domain in DOMAINS),
                spread([macro(r) for r in found]),
                f"{mean(r['predicted']['tau'] for r in found):.2f}",
                str(len(found)),
                f"{found[0]['parameters'] / 1e6:.2f} M",
                f"{mean(r['training']['cpu_seconds'] for r in found):.0f}",
            ]
        )
    header = ["", *DOMAINS, "macro", "predicted on held-out self-play", "seeds", "trained", "processor seconds"]
    return table(header, rows)


def gains(results: Sequence[Result]) -> str:
    """DSpark over the others: ratios of τ of the same seed."""
    lines = []
    for family, layers in (("dflash", 2), ("eagle3", 1), ("dflash_l1", 2)):
        pairs = [
            (ours, theirs)
            for ours in chosen(results, "dspark", 2)
            for theirs in chosen(results, family, layers)
            if ours["seed"] == theirs["seed"]
        ]
        if pairs:
            ratios = [macro(ours) / macro(theirs) - 1 for ours, theirs in pairs]
            drafts = [(macro(ours) - 1) / (macro(theirs) - 1) - 1 for ours, theirs in pairs]
            each = ", ".join(
                f"{d} {mean(o['domains'][d]['tau'] / t['domains'][d]['tau'] - 1 for o, t in pairs):+.1%}"
                for d in DOMAINS
            )
            lines.append(
                f"- DSpark over {NAMES[family]}: macro τ {mean(ratios):+.1%} "
                f"(seeds {', '.join(f'{r:+.1%}' for r in ratios)}; "
                f"{each}); accepted drafts a round, τ − 1: {mean(drafts):+.1%}"
            )
    return "\n".join(lines)


def along(results: Sequence[Result], axis: str, keep: Callable[[Result], bool]) -> str:
    """Macro τ by a field, families in rows; and what a round costs where γ is the field."""
    kept = [r for r in results if keep(r)]
    places = sorted({r[axis] for r in kept})
    rows = []
    for family in NAMES:
        at = {place: [r for r in kept if r["family"] == family and r[axis] == place] for place in places}
        if any(at.values()):
            rows.append([NAMES[family], *(spread([macro(r) for r in at[p]]) if at[p] else "-" for p in places)])
            rows.append(["… ms a step", *(f"{mean(map(step_ms, at[p])):.1f}" if at[p] else "-" for p in places)])
    return table([axis, *map(str, places)], rows)


def step_ms(result: Result) -> float:
    """Processor milliseconds of an engine step of up to 16 requests, both domains together."""
    seconds, steps = zip(*((d["seconds"]["total"], d["steps"]) for d in result["domains"].values()), strict=True)
    return 1e3 * sum(seconds) / sum(steps)


def confidence(results: Sequence[Result]) -> str:
    """ECE, AUROC and Brier of DSpark's tokens and prefixes."""
    rows = []
    for domain in DOMAINS:
        for kind in ("conditional", "survival"):
            scores = [s for r in chosen(results, "dspark", 2) for s in r["domains"][domain]["reliability"][kind]]
            cells = [shown(weighted(scores, field), "{:.3f}") for field in ("ece", "auroc", "brier")]
            rows.append([domain, "token" if kind == "conditional" else "prefix", *cells])
    return table(["", "of", "ECE", "AUROC", "Brier"], rows, texts=2)


def figures(results: Sequence[Result], out: Path) -> None:
    """The paper's figures that the finished runs allow."""
    main = {NAMES[f]: chosen(results, f, n) for f, n in (("dspark", 2), ("dflash", 2), ("eagle3", 1))}
    main = {name: found for name, found in main.items() if found}
    panels = []
    for domain in DOMAINS:
        curves = {name: by_position([r["domains"][domain] for r in found]) for name, found in main.items()}
        panels.append(Panel(domain, "position in the block", "accepted, given the prefix", curves, low=0.0, high=1.0))
    draw(out / "families_by_position.png", panels)
    curves_over(results, "gamma", out / "families_by_gamma.png")
    curves_over(results, "layers", out / "families_by_depth.png")
    ours = chosen(results, "dspark", 2)
    if not ours:
        return
    panels = []
    for kind, title in (("conditional", "confidence of a token"), ("survival", "survival of a prefix")):
        each = {d: [s["bins"] for r in ours for s in r["domains"][d]["reliability"][kind]] for d in DOMAINS}
        curves = {f"DSpark, {d}": pooled([one for bins in found for one in bins]) for d, found in each.items()}
        panels.append(Panel(title, "predicted", "accepted", curves, whole_x=False, diagonal=True, low=0.0, high=1.0))
    draw(out / "families_reliability.png", panels)
    x = "confidence threshold"
    curves = [
        {f"DSpark, {d}": swept([r["domains"][d]["thresholds"] for r in ours], field) for d in DOMAINS}
        for field in ("acceptance_rate", "tau")
    ]
    rate = Panel("acceptance rate", x, "accepted / verified", curves[0], whole_x=False, low=0.0, high=1.02)
    draw(out / "families_threshold.png", [rate, Panel("tokens per round", x, "τ", curves[1], whole_x=False, low=1.0)])


def swept(sweeps: Sequence[Sequence[dict[str, float | None]]], field: str) -> Points:
    """Means over seeds at every threshold that lets something through."""
    points = []
    for at in zip(*sweeps, strict=True):
        values = [point[field] for point in at]
        if all(value is not None for value in values):
            points.append((at[0]["threshold"], mean(values)))
    return points


def curves_over(results: Sequence[Result], axis: str, path: Path) -> None:
    """Macro τ by γ (2 layers) or by depth (γ = 7); by γ also what a step costs."""
    tau: dict[str, list[tuple[float, float]]] = {}
    cost: dict[str, list[tuple[float, float]]] = {}
    for family in ("dspark", "dflash"):
        same = [
            r for r in results if r["family"] == family and (r["layers"] == 2 if axis == "gamma" else r["gamma"] == 7)
        ]
        for place in sorted({r[axis] for r in same}):
            found = [r for r in same if r[axis] == place]
            tau.setdefault(NAMES[family], []).append((place, mean(map(macro, found))))
            cost.setdefault(NAMES[family], []).append((place, mean(map(step_ms, found))))
    if max(map(len, tau.values()), default=0) < 2:
        return
    x = "γ, tokens drafted" if axis == "gamma" else "layers"
    panels = [Panel("tokens per round", x, "τ, mean of code and prose", tau)]
    if axis == "gamma":
        panels.append(Panel("time of a step, 16 requests", x, "processor milliseconds", cost, low=0.0))
    draw(path, panels)
