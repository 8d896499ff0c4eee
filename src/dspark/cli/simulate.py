"""`dspark simulate`: how many replicas a day of traffic needs, and what they reach, from a measured profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark.cli.inputs import span
from dspark.common.errors import UserError


def simulate(
    profile: Annotated[Path, typer.Option(help="From dspark profile --output.")],
    trace: Annotated[Path, typer.Option(help="Rounds, from dspark bench load --trace.")],
    peak: Annotated[float, typer.Option(help="Requests per second at the busiest time.")],
    policies: Annotated[str, typer.Option(help="Planners to plan with, with commas.")] = "none,joint",
    arrivals: Annotated[str, typer.Option(help="day, steady, or a CSV trace scaled to the peak.")] = "day",
    bins: Annotated[int, typer.Option(min=1, help="Stretches of constant rate.")] = 288,
    prompt_tokens: Annotated[str, typer.Option(help="LOW:HIGH tokens of a prompt.")] = "32:96",
    new_tokens: Annotated[str, typer.Option(help="LOW:HIGH tokens to write.")] = "32:96",
    speed: Annotated[float | None, typer.Option(help="Promise: tokens/s of 95 of 100 requests.")] = None,
    first_token_ms: Annotated[float | None, typer.Option(help="Promise: wait of 95 of 100 requests.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Default: as many as the promise needs.")] = None,
    price: Annotated[float, typer.Option(min=0, help="Of a replica for an hour.")] = 0.0,
    validate: Annotated[Path | None, typer.Option(help="A load.json to compare the simulator with.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Write simulation.md, .json and figures here.")] = None,
) -> None:
    """Plan a fleet of replicas of the engine on paper."""
    for name, value in (("peak", peak), ("speed", speed), ("first-token-ms", first_token_ms)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} {value:g} is not above 0; pass a positive number")

    from rich.console import Console
    from rich.markdown import Markdown

    from dspark.simulation.capacity import Goal
    from dspark.simulation.replica import Sizes
    from dspark.simulation.report import PlanSettings, markdown, plan, write_plan
    from dspark.speculation.planner import check_planner

    names = [name for name in policies.split(",") if name]
    for name in names:
        check_planner(name)
    settings = PlanSettings(
        profile=str(profile),
        trace=str(trace),
        policies=names,
        sizes=Sizes(span("prompt-tokens", prompt_tokens), span("new-tokens", new_tokens), {}),
        goal=Goal(speed, None if first_token_ms is None else first_token_ms / 1000),
        peak=peak,
        arrivals=arrivals,
        bins=bins,
        replicas=replicas,
        price=price,
        load=str(validate) if validate else None,
        seed=seed,
    )
    result = plan(settings)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(Markdown(markdown(result)))
    if out is not None:
        write_plan(result, out)
        console.print(f"wrote {out}/simulation.md", soft_wrap=True)
