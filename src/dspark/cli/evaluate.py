"""`dspark evaluate`: what drafters are worth on benchmark sets: τ, acceptance, speed and honesty."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark.cli.inputs import Device, Dtype, the_pair
from dspark.common.errors import UserError


def evaluate(
    drafter: Annotated[
        list[str] | None,
        typer.Argument(help="Directories, hub ids or ngram, as LABEL=SOURCE if need be; default: the pair's."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Directory or hub id; default: the embedded one.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="gsm8k, math500, aime25, mbpp, humaneval, livecodebench, mt-bench, alpaca, arena-hard, "
            "or a .jsonl file of turns; may be repeated. Default: the demo's prompts."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Read sets from NAME.jsonl in this directory, not from the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N conversations of every set.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for evaluation.json, evaluation.md and figures.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens a turn, at most.")] = 256,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Gives the coupled rule; default: the rejection rule.")] = None,
    planner: Annotated[str, typer.Option(help="full is what reliability and thresholds need.")] = "full",
    gamma: Annotated[list[int] | None, typer.Option(min=1, help="Draft this many tokens; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Conversations decoded together.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; medians are reported.")] = 3,
    thinking: Annotated[bool, typer.Option(help="Let chat templates that can ask for thinking.")] = False,
    figures: Annotated[bool, typer.Option(help="Draw figures into --out.")] = True,
    compile: Annotated[bool, typer.Option(help="Compile the engine's forward first, once per machine.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare drafters on benchmark sets, in one table."""
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; pass a directory")

    from dspark.common.log import quiet_libraries
    from dspark.demo.prompts import PROMPTS
    from dspark.evaluation.run import run_evaluation
    from dspark.evaluation.suite import EvaluationSettings
    from dspark.evaluation.tasks import Conversations, load_task

    quiet_libraries()
    source, drafts = the_pair(target, drafter[0] if drafter else None)
    settings = EvaluationSettings(
        target=source,
        drafters=tuple(drafter or [f"{'demo' if target is None else 'drafter'}={drafts}"]),
        planner=planner,
        gammas=tuple(gamma or ()),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch=batch,
        rounds=rounds,
        thinking=thinking,
        compile=compile,
        dtype=dtype,
        device=device,
    )
    if task:
        tasks = [load_task(name, directory=data, limit=limit) for name in task]
    else:
        tasks = [Conversations("demo prompts", [[text] for text in PROMPTS[:limit]])]
    run_evaluation(settings, tasks, out, figures=figures)
