"""An evaluation as a person asked for it: progress on the screen, JSON, Markdown and figures in a directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dspark.common.collector import freeze_startup
from dspark.common.errors import UserError
from dspark.common.files import replacing_file
from dspark.common.log import seconds_of
from dspark.common.plots import check_matplotlib
from dspark.evaluation.figures import draw_figures
from dspark.evaluation.markdown import names, report, shown
from dspark.evaluation.suite import PLAIN, EvaluationSettings, contestants, evaluate, pages_for
from dspark.evaluation.tasks import Conversations
from dspark.models.loading import load_tokenizer
from dspark.models.target import Target


def run_evaluation(
    settings: EvaluationSettings, tasks: Sequence[Conversations], out: Path | None, *, figures: bool = True
) -> dict[str, Any]:
    """Measure, print the table, write numbers, text and figures into `out`; returns the numbers."""
    if out is not None and figures:
        check_matplotlib()
    if len({task.name for task in tasks}) < len(tasks):
        raise UserError("two tasks have the same name; rename one of the files")
    console = Console(highlight=False)
    target = Target.load(settings.target, dtype=settings.dtype, device=settings.device)
    pages = pages_for(target, tasks, settings, load_tokenizer(settings.target))
    made = contestants(settings, target, pages)
    with seconds_of(console, "compiling the forwards, once for this machine") as tick:
        for one in made:
            one.core.wait_compiled(tick)
    freeze_startup()
    batches = sum(-(-len(task.turns) // settings.batch) for task in tasks)
    result: dict[str, Any] = {}
    with Progress(console=console, transient=True) as progress:
        ticks = progress.add_task("evaluating", total=len(made) * (len(tasks) + settings.rounds * batches))
        for found in evaluate(settings, target, tasks, made):
            progress.advance(ticks)
            result = found or result
    console.print(overview(result))
    if out is not None:
        write(result, out, figures=figures)
        console.print(f"wrote {out}/evaluation.md", soft_wrap=True)
    return result


def write(result: dict[str, Any], out: Path, *, figures: bool) -> None:
    """Numbers first, text last: a directory with evaluation.md is complete."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing_file(out / "evaluation.json") as fresh:
        fresh.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    drawn = draw_figures(result, out) if figures else []
    with replacing_file(out / "evaluation.md") as fresh:
        fresh.write_text(report(result, [path.name for path in drawn]), encoding="utf-8")


def overview(result: dict[str, Any]) -> Table:
    """Means over the tasks, for the screen."""
    sets = ", ".join(f"{name} ({task['conversations']})" for name, task in result["tasks"].items())
    view = Table(title=f"{sets}; {result['where']['device']}", title_justify="left")
    view.add_column("")
    for name in ("tokens/s", "× plain", "τ", "accepted"):
        view.add_column(name, justify="right")
    for name in [PLAIN, *names(result)]:
        mean = result["average"][name]
        cells = (
            ("tokens_per_second", "{:.0f}"),
            ("speed_up", "{:.2f}"),
            ("tau", "{:.2f}"),
            ("acceptance_rate", "{:.1%}"),
        )
        view.add_row(name, *(shown(mean[field], form) for field, form in cells))
    return view
