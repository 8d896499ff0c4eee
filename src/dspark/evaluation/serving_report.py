"""What a served load amounted to: throughput, latencies, goodput; the table, the figures, JSON as vLLM names it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dspark.common.errors import UserError
from dspark.common.files import replacing_file
from dspark.common.plots import Panel, draw
from dspark.evaluation.client import Answer
from dspark.evaluation.serving import Offered

METRICS = {"ttft": "time to first token", "tpot": "time per output token", "itl": "between events", "e2el": "whole"}
PROMISES = ("ttft", "tpot", "e2el")


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Milliseconds by metric from NAME:MS, several with commas or spaces. Raises UserError."""
    found = {}
    for part in " ".join(texts).replace(",", " ").split():
        name, _, limit = part.partition(":")
        try:
            found[name] = float(limit)
        except ValueError:
            found[name] = -1.0
        if name not in PROMISES or not 0 <= found[name] < float("inf"):
            raise UserError(f"--goodput {part!r} is no limit; pass for example --goodput ttft:200,tpot:20,e2el:3000")
    return found


def summary(offered: Offered, *, goodput: Mapping[str, float], percentiles: Sequence[float]) -> dict[str, Any]:
    """The numbers of a load. Latencies are of requests that were answered; a failed one is only counted."""
    good = [answer for answer in offered.answers if answer.error is None]
    seconds = offered.duration
    written, read = sum(a.output_tokens for a in good), sum(a.prompt_tokens for a in good)
    kept = sum(all(1000 * value <= goodput[name] for name, value in _promised(a) if name in goodput) for a in good)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(offered.answers) - len(good),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(good) / seconds,
        "request_goodput": kept / seconds if goodput else None,
        "output_throughput": written / seconds,
        "total_token_throughput": (read + written) / seconds,
        "max_concurrent_requests": most_at_once(good),
    }
    samples = {
        "ttft": [a.ttft for a in good],
        "tpot": [a.tpot for a in good if a.output_tokens > 1],
        "itl": [gap for a in good for gap in a.itl],
        "e2el": [a.latency for a in good],
    }
    for name, values in samples.items():
        array = 1000 * np.array(values or [0.0])
        found |= {f"mean_{name}_ms": float(array.mean()), f"median_{name}_ms": float(np.median(array))}
        found[f"std_{name}_ms"] = float(array.std())
        found |= {f"p{p:g}_{name}_ms": float(np.percentile(array, p)) for p in percentiles}
    return found | (offered.speculation or {})


def _promised(answer: Answer) -> list[tuple[str, float]]:
    return [("ttft", answer.ttft), ("tpot", answer.tpot), ("e2el", answer.latency)]


def most_at_once(answers: Sequence[Answer]) -> int:
    """The most requests that were on their way at one moment."""
    changes = sorted([(a.start, 1) for a in answers] + [(a.start + a.latency, -1) for a in answers])
    return int(max(np.cumsum([change for _, change in changes]), default=0))


def details(offered: Offered) -> dict[str, Any]:
    """Every request on its own, as `--save-detailed` has it; seconds."""
    answers = offered.answers
    ok = [answer.error is None for answer in answers]
    return {
        "input_lens": [a.prompt_tokens for a in answers],
        "output_lens": [a.output_tokens if good else 0 for a, good in zip(answers, ok, strict=True)],
        "start_times": [a.start for a in answers],
        "ttfts": [a.ttft if good else 0.0 for a, good in zip(answers, ok, strict=True)],
        "itls": [a.itl if good else [] for a, good in zip(answers, ok, strict=True)],
        "errors": [a.error or "" for a in answers],
    }


def report(
    offered: Offered,
    asked: Mapping[str, Any],
    *,
    goodput: Mapping[str, float],
    percentiles: Sequence[float],
    file: Path | None = None,
    figures: Path | None = None,
) -> dict[str, Any]:
    """Print the table; write JSON and figures where there is a place for them; returns what JSON holds."""
    found = summary(offered, goodput=goodput, percentiles=percentiles)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(overview(found, goodput))
    console.print(latencies(found, percentiles))
    errors = Counter(answer.error for answer in offered.answers if answer.error is not None)
    for error, count in errors.most_common(5):
        console.print(f"{count} failed: {error}", soft_wrap=True)
    result = {"date": datetime.now().strftime("%Y%m%d-%H%M%S"), **asked, **found, **details(offered)}
    if file is not None:
        with replacing_file(file) as fresh:
            fresh.write_text(json.dumps(result), encoding="utf-8")
    if figures is not None:
        draw_serving(figures, offered)
    return result


def overview(found: Mapping[str, Any], goodput: Mapping[str, float]) -> Table:
    """One line a number."""
    shown = Table("load", "", show_header=False)
    shown.add_row("requests answered, failed", f"{found['completed']}, {found['failed']}")
    shown.add_row("seconds", f"{found['duration']:.2f}")
    shown.add_row("most at once", str(found["max_concurrent_requests"]))
    shown.add_row("tokens read, written", f"{found['total_input_tokens']}, {found['total_output_tokens']}")
    shown.add_row("requests/s", f"{found['request_throughput']:.2f}")
    if goodput:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput.items())
        shown.add_row(f"requests/s within {limits}", f"{found['request_goodput']:.2f}")
    shown.add_row("tokens/s written", f"{found['output_throughput']:.1f}")
    if "spec_decode_acceptance_length" in found:
        shown.add_row("τ, as the server counts", f"{found['spec_decode_acceptance_length']:.2f}")
    return shown


def latencies(found: Mapping[str, Any], percentiles: Sequence[float]) -> Table:
    """A line for each latency."""
    columns = ["mean", "median", *(f"p{p:g}" for p in percentiles)]
    shown = Table("ms", "", *columns)
    for name, text in METRICS.items():
        cells = [f"{found[f'{column}_{name}_ms']:.2f}" for column in columns]
        shown.add_row(name.upper(), text, *cells)
    return shown


def draw_serving(out: Path, offered: Offered) -> None:
    """Latencies by percentile, and in the course of the load. Raises UserError where nothing was answered."""
    good = sorted((a for a in offered.answers if a.error is None), key=lambda a: a.start)
    if not good:
        raise UserError("no request was answered, so there is nothing to draw; read the errors above")
    out.mkdir(parents=True, exist_ok=True)
    at = np.linspace(0, 100, 21)
    sets = {
        "TTFT": [a.ttft for a in good],
        "TPOT": [a.tpot for a in good],
        "ITL": [gap for a in good for gap in a.itl] or [0.0],
        "E2EL": [a.latency for a in good],
    }
    panels = []
    for name, values in sets.items():
        curve = zip(at.tolist(), (1000 * np.percentile(values, at)).tolist(), strict=True)
        panels.append(Panel(name, "percentile", "ms", {"latency": list(curve)}, low=0.0))
    draw(out / "latency.png", panels)
    began = good[0].start
    course = {
        "TTFT": [(a.start - began, 1000 * a.ttft) for a in good],
        "E2EL": [(a.start - began, 1000 * a.latency) for a in good],
    }
    draw(out / "course.png", [Panel("Latency by departure", "s", "ms", course, whole_x=False, low=0.0)])
