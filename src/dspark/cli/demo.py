"""`dspark demo`: real Python, written by plain decoding and by DSpark side by side, and what that gained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark.cli.inputs import Planner, check_output, prompt_text, the_pair


def demo(
    prompt: Annotated[str | None, typer.Option(help="Complete this instead of the built-in prompts.")] = None,
    file: Annotated[Path | None, typer.Option(help="Complete this UTF-8 file; - is standard input.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the coloured texts as a page.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write for each prompt.")] = 96,
    seed: Annotated[int, typer.Option(help="The text's noise at a temperature above 0.")] = 0,
    planner: Planner = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each prompt; medians are reported.")] = 3,
    compile: Annotated[bool, typer.Option(help="Compile the target's forward, once per machine.")] = True,
    target: Annotated[str | None, typer.Option(help="Another target: directory or hub id.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Another drafter: directory, hub id or ngram.")] = None,
) -> None:
    """Complete Python code with plain decoding and with DSpark, and compare speed and text."""
    check_output(html)
    text = prompt_text(prompt, file)

    from dspark.common.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)

    from dspark.common.log import quiet_libraries
    from dspark.demo.prompts import PROMPTS
    from dspark.demo.show import show

    quiet_libraries()
    source, drafts = the_pair(target, drafter)
    show(
        target=source,
        drafter=drafts,
        planner=planner,
        prompts=[text] if text is not None else PROMPTS,
        params=params,
        rounds=rounds,
        compile=compile,
        html=html,
    )
