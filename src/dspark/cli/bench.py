"""`dspark bench decode`: the engine against plain decoding and against `transformers` generate, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark.cli.inputs import check_output

app = typer.Typer(no_args_is_help=True, help="Measure speed.")


@app.callback()
def bench() -> None:
    """Measure speed."""


@app.command()
def decode(
    target: Annotated[str | None, typer.Option(help="Directory or hub id; default: the demo's.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Directory, hub id, ngram; default: the demo's.")] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSON Lines of {"turns": [...]} or {"prompt": ...}.')] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use the first N prompts.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write for each; end-of-text is ignored.")] = 128,
    temperature: Annotated[float, typer.Option()] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Gives the coupled rule; default: the rejection rule.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; medians are reported.")] = 3,
    planner: Annotated[str, typer.Option(help="full, fixed:N or threshold:C.")] = "full",
    assistant: Annotated[str | None, typer.Option(help="A small model for transformers' assisted generation.")] = None,
    library: Annotated[bool, typer.Option(help="Also measure transformers generate.")] = True,
    compile: Annotated[bool, typer.Option(help="Compile the engine's forward first, once per machine.")] = True,
    dtype: Annotated[str, typer.Option()] = "auto",
    device: Annotated[str, typer.Option()] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write everything measured here.")] = None,
) -> None:
    """Compare decoding speeds, every way in turn, medians of several rounds."""
    check_output(json)

    from dspark.common.log import quiet_libraries
    from dspark.demo.pair import demo_drafter_path, demo_target_path
    from dspark.demo.prompts import PROMPTS
    from dspark.evaluation.decode_report import DecodeSettings, compare_decoding
    from dspark.evaluation.prompts import read_prompts

    quiet_libraries()
    settings = DecodeSettings(
        target=target or str(demo_target_path()),
        drafter=drafter or str(demo_drafter_path()),
        planner=planner,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        batch=batch,
        rounds=rounds,
        assistant=assistant,
        library=library,
        compile=compile,
        dtype=dtype,
        device=device,
    )
    compare_decoding(settings, read_prompts(prompts, limit) if prompts is not None else list(PROMPTS[:limit]), json)
