"""`dspark generate`: text from any target and drafter, streamed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark.cli.inputs import Device, Dtype, Planner, check_output, prompt_text, the_pair
from dspark.common.errors import UserError

if TYPE_CHECKING:
    from dspark.engine.request import Commit


def generate(
    target: Annotated[
        str | None, typer.Argument(help="A causal LM: directory or hub id; default: the embedded one.")
    ] = None,
    drafter: Annotated[
        str, typer.Option(help="Directory, hub id, ngram or none; auto: the one inside TARGET.")
    ] = "auto",
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="Continue this UTF-8 file; - is standard input.")] = None,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the text here instead of standard output.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this share.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text, whatever the drafter.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    planner: Planner = "auto",
    max_draft: Annotated[int | None, typer.Option(help="Draft at most this many tokens a round.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the target's forward first, once per machine.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Continue a prompt, and say on standard error what speculation gained."""
    check_output(output)
    text = prompt_text(prompt, file)
    if not text:
        raise UserError("there is no prompt; pass --prompt TEXT or --file FILE")

    from dspark.common.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )

    from rich.console import Console

    from dspark.common.chat import render_chat
    from dspark.common.collector import freeze_startup
    from dspark.common.log import quiet_libraries, seconds_of
    from dspark.engine.llm import LLM

    quiet_libraries()
    source, drafts = the_pair(target, drafter, needed=False)
    llm = LLM(source, drafts, planner, dtype=dtype, device=device, max_running=1, compile=compile, max_draft=max_draft)
    with seconds_of(Console(stderr=True), "compiling the forwards, once for this machine") as tick:
        llm.core.wait_compiled(tick)
    freeze_startup()
    tokens = render_chat(llm.tokenizer, [{"role": "user", "content": text}]) if chat else text
    with _sink(output) as write:
        for commit in llm.stream(tokens, params):
            write(commit.text)
    print(_statistics(commit), file=sys.stderr)


@contextmanager
def _sink(output: Path | None) -> Iterator[Callable[[str], object]]:
    """Where text goes: standard output as it comes, or a file that appears whole when the text is."""
    if output is None:

        def show(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        yield show
        sys.stdout.write("\n")
        return
    from dspark.common.files import replacing_file

    with replacing_file(output) as fresh, fresh.open("w", encoding="utf-8") as file:
        yield file.write


def _statistics(last: Commit) -> str:
    """One line: tokens, speed, and what the drafter was worth."""
    statistics = last.statistics
    tokens = statistics.committed + 1  # the commit that ends the prefill is no round
    seconds = (statistics.finished or 0.0) - statistics.arrived
    line = f"[{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s, ended by {last.finish_reason}"
    if statistics.drafted:
        line += (
            f"; τ {statistics.tokens_per_round:.2f} over {statistics.rounds} rounds, "
            f"{statistics.accepted} of {statistics.verified} verified drafts accepted"
        )
    return line + "]"
