"""`dspark profile`: measures what an engine's steps cost on this machine, for planners, SGLang and the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark.cli.inputs import Device, Dtype, check_output, the_pair

if TYPE_CHECKING:
    from dspark.engine.profile import Profile


def profile(
    target: Annotated[
        str | None, typer.Argument(help="A causal LM: directory or hub id; default: the embedded one.")
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Directory, hub id, ngram or none; default: the pair's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the profile here, as `simulate` reads it.")] = None,
    sps: Annotated[Path | None, typer.Option(help="Write SGLang's table of steps per second.")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="Spend about this long on measuring.")] = 10.0,
    max_draft: Annotated[int | None, typer.Option(help="Draft at most this many tokens a round.")] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests at the same time, at most.")] = 64,
    compile: Annotated[bool, typer.Option(help="Compile the forwards first, once per machine.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure the cost of a step by rows, requests, context, prefill and draft; keep it for the next start."""
    check_output(output)
    check_output(sps)

    from rich.console import Console

    from dspark.common.collector import freeze_startup
    from dspark.common.log import quiet_libraries, seconds_of
    from dspark.engine.build import build_engine
    from dspark.engine.profile import keep, measure

    quiet_libraries()
    console = Console(highlight=False)
    source, drafts = the_pair(target, drafter, needed=False)
    core = build_engine(
        source,
        drafts,
        "none",
        dtype=dtype,
        device=device,
        compile=compile,
        max_draft=max_draft,
        max_running=max_running,
    )
    with seconds_of(console, "compiling the forwards, once for this machine") as tick:
        core.wait_compiled(tick)
    freeze_startup()
    with seconds_of(console, "measuring steps") as tick:
        made = measure(core, seconds=seconds, tick=tick)
    kept = keep(made)
    show(console, made)
    if output is not None:
        made.save(output)
    if sps is not None:
        made.cost.save_sps(sps)
    console.print(f"{made.steps} steps in {made.seconds:.1f} s; kept in {kept}")


def show(console: object, made: Profile) -> None:
    """The profile as a person reads it: a table by rows, one of drafts, and the terms beside them."""
    from rich.console import Console
    from rich.table import Table

    assert isinstance(console, Console)
    cost = made.cost
    for name, value in made.identity.items():
        console.print(f"{name}: {value}")
    rows = Table("rows with logits", *map(str, cost.rows), title="a step without drafting")
    rows.add_row("ms", *(f"{1000 * seconds:.2f}" for seconds in cost.seconds))
    console.print(rows)
    if cost.draft_seconds:
        drafts = Table("requests", *(f"{slots} slots" for slots in cost.draft_slots), title="a draft, ms")
        for requests, line in zip(cost.draft_requests, cost.draft_seconds, strict=True):
            drafts.add_row(str(requests), *(f"{1000 * seconds:.2f}" for seconds in line))
        console.print(drafts)
    console.print(
        f"and {1e6 * cost.per_request:.1f} µs a request, {1e6 * cost.per_context:.3f} µs a token in the pages, "
        f"{1e9 * cost.per_attended:.1f} ns a row and token it attends to; "
        f"a row of prefill is {cost.prefill_weight:.2f} of a row with logits"
    )
    if cost.inert:
        console.print("the table is flat: verifying more costs next to nothing here, so there is nothing to trim")
