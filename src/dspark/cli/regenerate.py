"""`dspark data regenerate`: prompts answered by the target itself, through servers or in this process."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark.cli.inputs import Template, template_options
from dspark.common.errors import UserError

if TYPE_CHECKING:
    from dspark.training.regenerate import Progress, Settings


def regenerate(
    source: Annotated[Path, typer.Argument(help="A directory made by `dspark data import`.")],
    out: Annotated[Path, typer.Option(help="The directory to write; answers wait in OUT.partial until all are there.")],
    url: Annotated[list[str] | None, typer.Option(help="An OpenAI-compatible server; may be repeated.")] = None,
    target: Annotated[str | None, typer.Option(help="Instead of --url: load this model here.")] = None,
    drafter: Annotated[str, typer.Option(help="With --target: directory, hub id, ngram, auto or none.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="The servers' name for the model; default: the one they have.")
    ] = None,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.")] = 0,
    min_p: Annotated[float, typer.Option()] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Longer answers are cut, and marked.")] = 2048,
    seed: Annotated[int, typer.Option(help="Every request's seed follows from it.")] = 0,
    template: Template = None,
    prompt_characters: Annotated[int, typer.Option(help="How much of a raw text is given to continue.")] = 400,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 64,
    retries: Annotated[int, typer.Option(min=0, help="Repetitions of a request that failed.")] = 8,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer.")] = 600.0,
    key_env: Annotated[str, typer.Option(help="The variable that holds the servers' API key.")] = "OPENAI_API_KEY",
    dtype: Annotated[str, typer.Option(help="With --target.")] = "auto",
    device: Annotated[str, typer.Option(help="With --target.")] = "auto",
) -> None:
    """Let the target answer the prompts. The same command goes on with a run that was stopped."""
    from dspark.common.sampling_params import SamplingParams
    from dspark.training.regenerate import Settings

    if bool(url) == bool(target):
        raise UserError("who answers? pass --url (a server, repeatable) or --target (a model loaded here), not both")
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )
    options = template_options(template)

    async def run() -> dict[str, Any]:
        answerer: Any
        if target:
            from dspark.cli.local_answers import LocalAnswers
            from dspark.common.log import quiet_libraries

            quiet_libraries()
            answerer = LocalAnswers(target, drafter, dtype=dtype, device=device, max_running=concurrency)
        else:
            from dspark.training.endpoints import Endpoints

            key = os.environ.get(key_env, "")
            answerer = Endpoints(url or (), key=key, timeout=timeout, retries=retries)
        async with answerer:
            name = target or await answerer.meet(model)
            return await written(source, out, answerer, Settings(name, params, options, prompt_characters), concurrency)

    try:
        report(out, asyncio.run(run()))
    except KeyboardInterrupt:
        typer.echo(f"stopped; the answers so far are in {out}.partial and the same command goes on", err=True)
        raise


async def written(source: Path, out: Path, answerer: Any, settings: Settings, concurrency: int) -> dict[str, Any]:
    """The run, with its progress on standard error."""
    from dspark.training.regenerate import regenerate as run

    with progress_bar(answerer) as watch:
        return await run(source, out, answerer, settings, concurrency=concurrency, watch=watch)


def report(out: Path, record: dict[str, Any]) -> None:
    """What was written, and what was not."""
    kept = ", ".join(f"{count:,} in {split}" for split, count in record["samples"].items())
    print(f"{out}: {kept}; {sum(record['endings'].values()):,} answers, {record['tokens']:,} tokens")
    if record["endings"].get("length"):
        print(f"{record['endings']['length']:,} answers were cut by length (--max-tokens {record['max_tokens']})")
    for reason, count in record["dropped"].items():
        print(f"dropped {count:,}: {reason}")
    for reason, count in record["refusals"].items():
        print(f"  {count:,}: {reason}")


@contextmanager
def progress_bar(answerer: Any) -> Iterator[Callable[[Progress], None]]:
    """Samples, tokens per second, repetitions and the time left: live on a terminal, else a line a minute."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    started = told = time.monotonic()
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("")

        def watch(progress: Progress) -> None:
            nonlocal told
            speed = progress.tokens / max(time.monotonic() - started, 1e-3)
            notes = [f"{speed:,.0f} tokens/s"]
            if getattr(answerer, "retried", 0):
                notes.append(f"{answerer.retried} repeated")
            if progress.refused:
                notes.append(f"{progress.refused.total()} refused")
            if bar.disable and time.monotonic() - told >= 60:
                told = time.monotonic()
                typer.echo(f"{progress.done:,} of {progress.total:,} · {' · '.join(notes)}", err=True)
            bar.update(task, total=progress.total, completed=progress.done, description=" · ".join(notes))

        yield watch
