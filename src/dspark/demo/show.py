"""The demo from beginning to end: load, race every prompt, measure quietly, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dspark.common.collector import freeze_startup
from dspark.common.files import replacing_file
from dspark.common.log import seconds_of
from dspark.common.provenance import device_name
from dspark.common.sampling_params import SamplingParams
from dspark.demo.compare import Tally, first_difference, measure
from dspark.demo.page import page
from dspark.demo.race import Lane
from dspark.demo.terminal import difference_lines, last_line, legend, run_race, tables
from dspark.drafters.registry import load_drafter
from dspark.models.target import Target

COMPILING = "compiling the forwards, once for this machine"


def show(
    *,
    target: str,
    drafter: str,
    planner: str,
    prompts: Sequence[str],
    params: SamplingParams,
    rounds: int,
    compile: bool = True,
    html: Path | None = None,
    console: Console | None = None,
) -> Tally:
    """Race, measure and report on `console`; write the page if one is asked for."""
    console = console or Console(highlight=False)
    model = Target.load(target)
    proposer = load_drafter(drafter, model)
    plain = Lane(model, None, "none", compile=compile)
    dspark = Lane(model, proposer, planner, compile=compile)
    for prompt in prompts:
        dspark.check(prompt, params)
    console.print(legend())
    console.print()
    outcomes = [
        run_race(console, plain, dspark, prompt, params, f"prompt {index + 1} of {len(prompts)}")
        for index, prompt in enumerate(prompts)
    ]
    with seconds_of(console, COMPILING) as tick:
        for lane in (plain, dspark):
            lane.core.wait_compiled(tick)
    freeze_startup()
    for outcome in outcomes:  # the race was the warm-up, and drew pictures between its steps
        outcome.plain.clear()
        outcome.dspark.clear()
    timing = measure(plain, dspark, outcomes, params, rounds=rounds)
    for _ in track(timing, "measuring", total=rounds * len(outcomes), console=console, transient=True):
        pass
    tally = Tally(outcomes)
    for table in tables(tally, dspark.name):
        console.print(table)
    difference = None if tally.same else first_difference(plain, dspark, outcomes, params)
    for line in difference_lines(difference, dspark.name) if difference is not None else ():
        console.print(line, soft_wrap=True)
    measured = _measured(tally, params, rounds, device_name(model.device))
    if html is not None:
        with replacing_file(html) as fresh:
            fresh.write_text(page(tally, drafter=dspark.name, measured=measured), encoding="utf-8")
        console.print(f"wrote {html}", soft_wrap=True)
    console.print(measured, style="dim", soft_wrap=True)
    console.print(last_line(tally), style="bold", soft_wrap=True)
    return tally


def _measured(tally: Tally, params: SamplingParams, rounds: int, device: str) -> str:
    prompts = len(tally.outcomes)
    return (
        f"measured: {tally.tokens} tokens for {prompts} prompt{'s' if prompts != 1 else ''}, one request at a time, "
        f"prefill included, temperature {params.temperature:g}, median of {rounds} interleaved run"
        f"{'s' if rounds != 1 else ''} after a warm-up; {device}"
    )
