"""`dspark bench`: `decode`, the engine against `transformers`; `load`, planners under load; `serve`, any server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark.cli import bench_serve
from dspark.cli.inputs import Device, Dtype, Planner, check_output, numbers, span, the_pair

POLICIES = "none,fixed:1,fixed:2,fixed:3,fixed:5,fixed:7,threshold:0.5,greedy,lagged,lookahead,joint"
USERS = "1,2,4,8,16,32,64"
app = typer.Typer(no_args_is_help=True, help="Measure speed.")
app.command()(bench_serve.serve)


@app.callback()
def bench() -> None:
    """Measure speed."""


@app.command()
def decode(
    target: Annotated[str | None, typer.Option(help="Directory or hub id; default: the embedded one.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Directory, hub id or ngram; default: the pair's.")] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSON Lines of {"turns": [...]} or {"prompt": ...}.')] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use the first N prompts.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write for each; end-of-text is ignored.")] = 128,
    temperature: Annotated[float, typer.Option()] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Gives the coupled rule; default: the rejection rule.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; medians are reported.")] = 3,
    planner: Planner = "auto",
    assistant: Annotated[str | None, typer.Option(help="A small model for transformers' assisted generation.")] = None,
    library: Annotated[bool, typer.Option(help="Also measure transformers generate.")] = True,
    compile: Annotated[bool, typer.Option(help="Compile the engine's forward first, once per machine.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Annotated[Path | None, typer.Option(help="Write everything measured here.")] = None,
) -> None:
    """Compare decoding speeds, every way in turn, medians of several rounds."""
    check_output(json)

    from dspark.common.log import quiet_libraries
    from dspark.demo.prompts import PROMPTS
    from dspark.evaluation.decode_report import DecodeSettings, compare_decoding
    from dspark.evaluation.prompts import read_prompts

    quiet_libraries()
    source, drafts = the_pair(target, drafter)
    settings = DecodeSettings(
        target=source,
        drafter=drafts,
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


@app.command()
def load(
    target: Annotated[str | None, typer.Option(help="Directory or hub id; default: the embedded one.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Directory, hub id or ngram; default: the pair's.")] = None,
    policies: Annotated[str, typer.Option(help="Planners to compare, with commas.")] = POLICIES,
    users: Annotated[
        str, typer.Option(help="Closed loops: users at the same time, with commas; empty for none.")
    ] = USERS,
    rates: Annotated[str, typer.Option(help="Open loops: requests per second, with commas.")] = "",
    arrivals: Annotated[
        str, typer.Option(help="Of open loops: poisson, bursty, or a trace file to replay.")
    ] = "poisson",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; medians are reported.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.05, help="Of each policy at each load in each round.")] = 1.0,
    prompts: Annotated[Path | None, typer.Option(help='JSON Lines of {"turns": [...]} or {"prompt": ...}.')] = None,
    prompt_tokens: Annotated[str, typer.Option(help="LOW:HIGH tokens of a prompt.")] = "32:96",
    new_tokens: Annotated[str, typer.Option(help="LOW:HIGH tokens to write.")] = "32:96",
    noise: Annotated[float, typer.Option(help="Share of requests whose prompts are random tokens.")] = 0.0,
    blind: Annotated[bool, typer.Option(help="Replace the drafts of those requests by random tokens too.")] = False,
    temperature: Annotated[float, typer.Option()] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the requests and the arrivals.")] = 0,
    profile: Annotated[Path | None, typer.Option(help="From dspark profile; default: kept or measured.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the engine's forward first, once per machine.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    join: Annotated[list[Path] | None, typer.Option(help="An earlier load.json whose rows belong to these.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write rounds for `dspark simulate` here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write load.json and figures into this directory.")] = None,
) -> None:
    """Compare planners under closed and open load, every one in turn."""
    check_output(trace)
    names = [name for name in policies.split(",") if name]
    counts, speeds = numbers("users", users, whole=True), numbers("rates", rates)

    from dspark.common.log import quiet_libraries
    from dspark.demo.corpus import held_out_texts
    from dspark.demo.domains import listing
    from dspark.demo.pair import demo_target_path
    from dspark.demo.prompts import PROMPTS
    from dspark.evaluation.load_report import LoadSettings, run_load
    from dspark.evaluation.prompts import read_prompts
    from dspark.simulation.arrivals import arrivals_of
    from dspark.speculation.planner import check_planner

    quiet_libraries()
    for name in names:
        check_planner(name)
    source, drafts = the_pair(target, drafter)
    settings = LoadSettings(
        target=source,
        drafter=drafts,
        policies=names,
        users=[int(count) for count in counts],
        rates=speeds,
        rounds=rounds,
        seconds=seconds,
        blind=blind,
        profile=str(profile) if profile else None,
        compile=compile,
        dtype=dtype,
        device=device,
        workload={
            "prompt_tokens": span("prompt-tokens", prompt_tokens),
            "new_tokens": span("new-tokens", new_tokens),
            "noise": noise,
            "temperature": temperature,
            "seed": seed,
        },
    )
    held_out = [text for _, text in held_out_texts(listing(demo_target_path()))] or PROMPTS
    texts = read_prompts(prompts) if prompts is not None else held_out
    due = {rate: arrivals_of(arrivals, rate=rate, seconds=seconds, seed=seed) for rate in speeds}
    run_load(settings, texts, due, out, joined=join or (), trace=trace)
