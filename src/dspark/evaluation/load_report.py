"""A load test as a person asked for it: policies side by side in one run; table, JSON, the paper's figures 7 and 8."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dspark.common.collector import freeze_startup
from dspark.common.errors import UserError
from dspark.common.files import replacing_file
from dspark.common.log import seconds_of
from dspark.common.plots import Panel, check_matplotlib, draw
from dspark.common.provenance import provenance
from dspark.engine.build import build_engine, calibration_of
from dspark.engine.profile import Profile, ensure_profile
from dspark.engine.step import EngineCore
from dspark.evaluation.load import Driver, Policy, Slice, closed_loop, open_loop, record_rounds
from dspark.evaluation.load_compare import by_kind, kind_table
from dspark.evaluation.workload import Workload
from dspark.speculation.calibration import Calibration
from dspark.speculation.cost import StepTime
from dspark.speculation.cost_fit import recalibrated


@dataclass(frozen=True)
class LoadSettings:
    """What is loaded, and how."""

    target: str
    drafter: str
    policies: Sequence[str]
    users: Sequence[int]  # a closed loop for each
    rates: Sequence[float] = ()  # requests per second: an open loop for each
    rounds: int = 5
    seconds: float = 1.0  # of each policy at each load in each round
    blind: bool = False  # no drafter can guess what follows random tokens
    profile: str | None = None
    compile: bool = True
    dtype: str = "auto"
    device: str = "auto"
    workload: dict[str, Any] = field(default_factory=dict)  # what it was, for the JSON


Arrivals = Mapping[float, Sequence[float]]  # by rate: seconds from the start


def load_test(
    settings: LoadSettings,
    workload: Workload,
    arrivals: Arrivals,
    *,
    core: EngineCore,
    meter: Callable[[StepTime], None] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Every policy at every load in turn, `rounds` times after one that warms up; one row of results for each.

    `meter` gets every step of the counted rounds.
    """
    profile = Profile.load(settings.profile) if settings.profile else None
    if profile is not None:
        profile.check(core, settings.profile or "")
    beside = calibration_of(core.drafter)
    calibration = Calibration.load(beside) if beside is not None else None
    policies = [Policy.of(core, name, profile, calibration) for name in settings.policies]
    driver = Driver(core, blind=settings.blind)
    slices: dict[tuple[str, str, float], list[Slice]] = {}
    for number in range(1 + settings.rounds):
        seconds = settings.seconds if number else min(settings.seconds, 0.5)
        for mode, load in _loads(settings):
            order = policies if number % 2 else policies[::-1]
            for policy in order:
                policy.enter(core, meter if number else None)
                if mode == "users":
                    found = closed_loop(driver, workload.users(int(load), number), seconds)
                else:
                    found = open_loop(driver, workload.stream(number), arrivals[load], seconds)
                if number:
                    slices.setdefault((mode, policy.name, load), []).append(found)
                tick()
    return [_row(mode, name, load, found) for (mode, name, load), found in sorted(slices.items())]


def _loads(settings: LoadSettings) -> Iterator[tuple[str, float]]:
    yield from (("users", float(users)) for users in settings.users)
    yield from (("rate", rate) for rate in settings.rates)


def _row(mode: str, name: str, load: float, slices: Sequence[Slice]) -> dict[str, Any]:
    """Medians over rounds of what a policy did at one load."""
    finished = [one for found in slices for one in found.finished]
    speeds = [one.speed for one in finished if one.speed is not None]
    waits = [one.waited for one in finished]
    count = {
        name: sum(getattr(one.statistics, name) for one in finished)
        for name in ("rounds", "drafted", "verified", "accepted")
    }
    rounds, verified = max(count["rounds"], 1), count["verified"]
    kinds = sorted({kind for found in slices for kind in found.tokens_by_kind})
    throughput = [found.tokens / found.seconds for found in slices]
    return {
        mode: load if mode == "rate" else int(load),
        "policy": name,
        "throughput": median(throughput),
        "throughput_rounds": throughput,
        "by_kind": {
            kind: median(found.tokens_by_kind.get(kind, 0) / found.seconds for found in slices) for kind in kinds
        },
        "kinds": {kind: _speeds_of(kind, slices) for kind in kinds},
        "user_speed": median(speeds) if speeds else None,
        "user_speed_p5": float(np.percentile(speeds, 5)) if speeds else None,
        "ttft_ms": 1000 * median(waits) if waits else None,
        "ttft_p95_ms": 1000 * float(np.percentile(waits, 95)) if waits else None,
        "tokens_per_round": 1 + count["accepted"] / rounds,
        "budget": 1 + verified / rounds,  # rows of the target a request gets in a step
        "drafted": count["drafted"] / rounds,
        "wasted": (verified - count["accepted"]) / rounds,  # rows a round verified in vain
        "step_ms": 1000 * median(found.seconds / max(found.steps, 1) for found in slices),
        "finished": len(finished),
        "left": median(found.left for found in slices),
        "outside": 1 - sum(found.inside for found in slices) / sum(found.seconds for found in slices),
    }


def _speeds_of(kind: str, slices: Sequence[Slice]) -> dict[str, Any]:
    """How fast requests of one kind were to their users: the median, and that of each round."""
    by_round = [[one.speed for one in found.finished if one.kind == kind and one.speed] for found in slices]
    everyone = [speed for speeds in by_round for speed in speeds]
    return {
        "user_speed": median(everyone) if everyone else None,
        "user_speed_rounds": [median(speeds) if speeds else None for speeds in by_round],
    }


def run_load(
    settings: LoadSettings,
    prompts: Sequence[str],
    arrivals: Arrivals,
    out: Path | None,
    *,
    joined: Sequence[Path] = (),
    trace: Path | None = None,
) -> dict[str, Any]:
    """Build the engine, measure, print the table, write JSON and figures into `out`; returns what JSON holds.

    Rows of earlier results in `joined` are shown and written together with the new ones. `trace` gets rounds
    for the simulator.
    """
    if out is not None:
        check_matplotlib()
    earlier = [row for path in joined for row in read_rows(path)]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has room for the table
    most = max([*settings.users, 64 if settings.rates else 1])
    core = build_engine(
        settings.target,
        settings.drafter,
        "none",
        dtype=settings.dtype,
        device=settings.device,
        compile=settings.compile,
        max_running=most,
        seed=0,
    )
    with seconds_of(console, "compiling the forwards, once for this machine") as tick:
        core.wait_compiled(tick)
    workload = Workload(
        [core.intake.tokenize(text) for text in prompts] if core.tokenizer is not None else [],
        core.target.vocab_size,
        **settings.workload,
    )
    longest = workload.prompt_tokens[1] + workload.new_tokens[1]
    if longest > core.intake.context_limit:
        raise UserError(f"prompts and answers of up to {longest} tokens exceed the context {core.intake.context_limit}")
    profile = ensure_profile(core) if settings.profile is None else Profile.load(settings.profile)
    freeze_startup()
    if trace is not None:
        record_rounds(Driver(core, blind=settings.blind), workload).save(trace)
    loads = len(settings.users) + len(settings.rates)
    steps: list[StepTime] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("load", total=(1 + settings.rounds) * loads * len(settings.policies))
        rows = load_test(
            settings, workload, arrivals, core=core, meter=steps.append, tick=lambda: progress.advance(task)
        )
    result = {"settings": asdict(settings), "provenance": provenance(core.target.device), "rows": earlier + rows}
    write(result, console, out)
    if out is not None:
        outside = max(median(row["outside"] for row in rows), 0.0)
        cost = recalibrated(profile.cost, steps, outside=outside)
        replace(profile, cost=cost, steps=len(steps)).save(out / "profile.json")
    return result


def write(result: dict[str, Any], console: Console, out: Path | None) -> None:
    """The table; JSON and figures where there is a directory for them."""
    rows = result["rows"]
    for mode in ("users", "rate"):
        if any(mode in row for row in rows):
            console.print(table([row for row in rows if mode in row], mode))
    if any(len(row.get("kinds", ())) > 1 for row in rows):
        console.print(kind_table(by_kind(rows)))
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    with replacing_file(out / "load.json") as fresh:
        fresh.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draw_load(out, [row for row in rows if "users" in row])
    console.print(f"wrote {out}/load.json", soft_wrap=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier load.json. Raises UserError for another file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of dspark bench load; pass its load.json") from error
    return list(rows)


def table(rows: Sequence[dict[str, Any]], mode: str) -> Table:
    """One line for each policy at each load."""
    shown = Table(mode, "policy", "tokens/s", "per user", "p5", "TTFT ms", "p95", "τ", "budget", "wasted", "step ms")
    ordered = sorted(rows, key=lambda row: row[mode])
    for number, row in enumerate(ordered):
        last = number + 1 == len(ordered) or ordered[number + 1][mode] != row[mode]
        cells = [_number(row[name], digits) for name, digits in COLUMNS]
        shown.add_row(f"{row[mode]:g}", row["policy"], *cells, end_section=last)
    return shown


COLUMNS = (
    ("throughput", 0),
    ("user_speed", 0),
    ("user_speed_p5", 0),
    ("ttft_ms", 1),
    ("ttft_p95_ms", 1),
    ("tokens_per_round", 2),
    ("budget", 2),
    ("wasted", 2),
    ("step_ms", 2),
)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def draw_load(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Figures 7 and 8 of the paper, from closed loops."""
    if not rows:
        return

    def curves(x: str, y: str) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(rows, key=lambda row: row["users"]):
            if row[x] is not None and row[y] is not None:
                found.setdefault(row["policy"], []).append((row[x], row[y]))
        return found

    total, users = "tokens/s in total", "users at the same time"
    frontier = curves("user_speed", "throughput")
    draw(out / "frontier.png", [Panel("Throughput and speed", "tokens/s of one user", total, frontier, whole_x=False)])
    throughput = Panel("Throughput", users, total, curves("users", "throughput"))
    budget = Panel("Verify budget", users, "rows of a request in a step", curves("users", "budget"))
    draw(out / "concurrency.png", [throughput, budget])
