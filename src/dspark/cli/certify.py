"""`dspark certify`: checks by sampling that target, drafter and planner together keep the target's distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dspark.cli.inputs import Device, Dtype, Planner, the_pair
from dspark.common.errors import UserError


def certify(
    target: Annotated[
        str | None, typer.Argument(help="A causal LM: directory or hub id; default: the embedded one.")
    ] = None,
    drafter: Annotated[str, typer.Option(help="Directory, hub id or ngram; auto: the one inside TARGET.")] = "auto",
    planner: Planner = "auto",
    prompts: Annotated[Path | None, typer.Option(help='JSON Lines of {"prompt": ...}; default: the demo\'s.')] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use the first N prompts.")] = 2,
    samples: Annotated[int, typer.Option(min=100, help="Texts of each kind for each prompt.")] = 2000,
    temperature: Annotated[float, typer.Option(help="A lower one makes fewer outcomes common.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.")] = 8,
    coupled: Annotated[bool, typer.Option(help="Check the coupled rule instead of the rejection rule.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare texts written with and without the drafter; exit code 1 when they can be told apart."""
    from rich.console import Console
    from rich.progress import Progress

    from dspark.common.log import quiet_libraries, seconds_of
    from dspark.common.sampling_params import SamplingParams
    from dspark.demo.prompts import PROMPTS
    from dspark.engine.build import build_engine
    from dspark.evaluation.certify import SHOWN
    from dspark.evaluation.certify import certify as compared
    from dspark.evaluation.prompts import read_prompts
    from dspark.models.target import Target

    acceptance: Literal["coupled", "rejection"] = "coupled" if coupled else "rejection"
    params = SamplingParams(max_tokens=6, temperature=temperature, top_k=top_k, acceptance=acceptance, ignore_eos=True)
    quiet_libraries()
    console = Console(highlight=False)
    texts = read_prompts(prompts, limit) if prompts is not None else list(PROMPTS[:limit])
    source, drafts = the_pair(target, drafter)
    model = Target.load(source, dtype=dtype, device=device)
    engines = [
        build_engine(model, one, plan, max_step_tokens=512, seed=seed)
        for seed, (one, plan) in enumerate([(drafts, planner), (None, "none")])
    ]
    if not engines[0].drafter.block_size:
        raise UserError(f"drafter {drafter} drafts nothing, so there is nothing to certify; pass another")
    for core in engines:
        with seconds_of(console, "compiling the forwards, once for this machine") as tick:
            core.wait_compiled(tick)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("sampling", total=len(texts))
        made = compared(
            engines[0], engines[1], texts, params, samples=samples, tick=lambda n: progress.update(task, completed=n)
        )
    for number, one in enumerate(made, 1):
        verdict = "same" if one.passed else "DIFFERENT"
        console.print(
            f"prompt {number}: {verdict}. {one.samples} texts of each kind, {one.cells} outcomes, {one.accepted} "
            f"drafts accepted; {one.distance:+.2f} standard deviations (limit {one.limit:.2f}); with confidence "
            f"{SHOWN:.0%} the laws differ by less than {one.bound:.3f} in total variation",
            soft_wrap=True,
        )
    if not sum(one.accepted for one in made):
        raise UserError("no drafted token was accepted, so nothing was checked; pass another drafter or planner")
    if not all(one.passed for one in made):
        raise typer.Exit(1)
