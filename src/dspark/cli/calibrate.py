"""`dspark calibrate`: makes a drafter's confidences probabilities, from rounds that are verified in full."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark.cli.inputs import Device, Dtype, check_output, the_pair
from dspark.common.errors import UserError
from dspark.common.plots import check_matplotlib


def calibrate(
    target: Annotated[
        str | None, typer.Argument(help="A causal LM: directory or hub id; default: the embedded one.")
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Directory or hub id; default: the pair's.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSON Lines of {"prompt": ...} or {"turns": ...}; default: the demo\'s held-out files.'),
    ] = None,
    limit: Annotated[int, typer.Option(min=6, help="Use the first N prompts; every third scores the fit.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write for each prompt and law.")] = 64,
    law: Annotated[
        list[str] | None, typer.Option(help="greedy, sampled or coupled; may be repeated. Default: all three.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the laws sampled and coupled.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="Default: calibration.json in the drafter's directory.")] = None,
    diagram: Annotated[Path | None, typer.Option(help="Also draw reliability diagrams into this PNG.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the forwards first, once per machine.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Fit the calibration of a drafter, show how true its confidences are, and keep it beside the drafter."""
    for path in (output, diagram):
        check_output(path)
    if diagram is not None:
        check_matplotlib()

    from rich.console import Console
    from rich.progress import Progress

    from dspark.common.log import quiet_libraries, seconds_of
    from dspark.demo.pair import demo_target_path
    from dspark.drafters.registry import load_drafter
    from dspark.engine.build import build_engine
    from dspark.evaluation.calibrate import calibrate as fitted
    from dspark.evaluation.calibrate import collect, params_of, table
    from dspark.evaluation.calibrate import diagram as draw
    from dspark.evaluation.prompts import read_prompts
    from dspark.models.loading import load_tokenizer
    from dspark.models.target import Target
    from dspark.speculation.calibration import FILE, LAWS, SGLANG_FILE

    laws = list(dict.fromkeys(law or LAWS))
    for name in laws:
        params_of(name, temperature, max_tokens, 0)
    if prompts is None and target is not None:
        raise UserError("there are no prompts; pass --prompts FILE with text this target was not trained on")
    quiet_libraries()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    directory = demo_target_path()
    source, drafts = the_pair(target, drafter)
    model = Target.load(source, dtype=dtype, device=device)
    proposer = load_drafter(drafts, model)
    if not proposer.block_size:
        raise UserError(f"drafter {drafter} drafts nothing, so there is nothing to calibrate; pass another")
    if output is None:
        output = Path(getattr(proposer, "directory", None) or ".") / FILE
    if prompts is None:
        from dspark.demo.domains import DOMAINS

        texts: list[str | list[int]] = [*DOMAINS["code"](load_tokenizer(directory), directory, limit, 1)]
    else:
        texts = [*read_prompts(prompts, limit)]
    core = build_engine(model, proposer, "full", compile=compile, seed=0)
    with seconds_of(console, "compiling the forwards, once for this machine") as tick:
        core.wait_compiled(tick)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("verifying drafts in full", total=len(texts) * len(laws))
        rounds = collect(
            core,
            texts,
            laws=laws,
            temperature=temperature,
            max_tokens=max_tokens,
            tick=lambda done: progress.update(task, completed=done),
        )
    made_from = {"prompts": prompts.name if prompts is not None else "held-out code of the demo", "count": len(texts)}
    made = fitted(core, rounds, made_from | {"max_tokens": max_tokens, "temperature": temperature})
    for name, one in made.fits.items():
        console.print(table(name, one))
    made.save(output)
    made.save_sglang(output.with_name(SGLANG_FILE))
    if diagram is not None:
        draw(made, diagram)
    console.print(f"wrote {output} and, as SGLang reads it, {output.with_name(SGLANG_FILE)}", soft_wrap=True)
