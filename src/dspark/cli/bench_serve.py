"""`dspark bench serve`: load on any OpenAI-compatible server, measured as `vllm bench serve` measures."""

from __future__ import annotations

import asyncio
import json as jsonlib
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dspark.cli.inputs import check_output, numbers, span
from dspark.common.errors import UserError
from dspark.common.extras import require


def serve(
    url: Annotated[str, typer.Option(help="The server, up to /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the only one the server has.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask for chat completions instead of completions.")] = False,
    prompts: Annotated[Path | None, typer.Option(help='JSON Lines of {"turns": [...]} or {"prompt": ...}.')] = None,
    prompt_words: Annotated[str, typer.Option(help="LOW:HIGH words of an invented prompt, without --prompts.")] = "64",
    max_tokens: Annotated[str, typer.Option(help="LOW:HIGH tokens to write.")] = "128",
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 100,
    request_rate: Annotated[float, typer.Option(help="Requests per second; inf: all at once.")] = math.inf,
    burstiness: Annotated[float, typer.Option(help="1: Poisson arrivals; less comes in bursts.")] = 1.0,
    trace: Annotated[
        Path | None, typer.Option(help="CSV of time[,prompt_tokens,new_tokens] to replay instead of a rate.")
    ] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests on their way at a time.")] = None,
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before those that count.")] = 1,
    temperature: Annotated[float, typer.Option()] = 0.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Write all tokens, if the server can.")] = False,
    extra_body: Annotated[str, typer.Option(help="JSON with more fields of every request.")] = "{}",
    goodput: Annotated[
        list[str] | None, typer.Option(help="Limits in ms of a good request, as in ttft:200,tpot:20,e2el:3000.")
    ] = None,
    percentiles: Annotated[str, typer.Option(help="With commas.")] = "90,95,99",
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")] = 0,
    key_env: Annotated[str, typer.Option(help="The variable that holds the API key.")] = "OPENAI_API_KEY",
    timeout: Annotated[float, typer.Option(help="Longest silence of the server, in seconds.")] = 600.0,
    json: Annotated[Path | None, typer.Option(help="Write everything measured here.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw latencies into this directory.")] = None,
) -> None:
    """Load a server; report throughput, TTFT, TPOT, ITL, E2EL and goodput as vllm bench serve defines them."""
    check_output(json)
    require("httpx2", "train")

    from dspark.common.plots import check_matplotlib
    from dspark.evaluation.client import Client
    from dspark.evaluation.serving import Offered, offer
    from dspark.evaluation.serving_report import parse_goodput, report

    if figures is not None:
        check_matplotlib()
    promised, points = parse_goodput(goodput or ()), numbers("percentiles", percentiles)
    if any(point > 100 for point in points):
        raise UserError(f"--percentiles {percentiles!r} goes past 100; pass for example --percentiles 50,99")
    fields = {"temperature": temperature, **({"ignore_eos": True} if ignore_eos else {}), **parsed_fields(extra_body)}
    questions = load_of(prompts, prompt_words, max_tokens, num_prompts, (request_rate, burstiness, trace), seed=seed)
    served = ""

    async def measure() -> Offered:
        nonlocal served
        key = os.environ.get(key_env, "")
        async with Client(url, chat=chat, key=key, timeout=timeout, extra=fields) as client:
            served = await client.meet(model)
            return await offer(client, questions, most=max_concurrency, warmups=num_warmups)

    offered = asyncio.run(measure())
    asked = {
        "endpoint_type": "openai-chat" if chat else "openai",
        "model_id": served,
        "num_prompts": len(questions),
        "request_rate": "inf" if trace is None and math.isinf(request_rate) else request_rate,
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
        "trace": str(trace) if trace else None,
        "seed": seed,
    }
    report(offered, asked, goodput=promised, percentiles=points, file=json, figures=figures)
    if all(answer.error is not None for answer in offered.answers):
        raise typer.Exit(1)


def load_of(
    prompts: Path | None,
    prompt_words: str,
    max_tokens: str,
    count: int,
    timing: tuple[float, float, Path | None],
    *,
    seed: int,
) -> list[Any]:
    """The questions of a load: at `timing` (rate, burstiness, trace), or as the trace's rows say."""
    import numpy as np

    from dspark.evaluation.prompts import read_prompts
    from dspark.evaluation.serving import questions_of, synthetic
    from dspark.simulation.arrivals import gamma, read_trace

    rate, burstiness, trace = timing
    words, tokens = span("prompt-words", prompt_words), span("max-tokens", max_tokens)
    lengths, spans = [words] * count, [tokens] * count
    if trace is None:
        dues = gamma(rate, count, burstiness, np.random.default_rng(seed)).tolist()
    else:
        rows = read_trace(trace)
        dues = rows.times_N.tolist()[:count]
        lengths = [(n, n) for n in rows.prompt_N.tolist()] if rows.prompt_N is not None else lengths
        spans = [(n, n) for n in rows.new_N.tolist()] if rows.new_N is not None else spans
    texts = read_prompts(prompts) if prompts is not None else synthetic(lengths[: len(dues)], seed)
    return questions_of(texts, dues, spans[: len(dues)], seed)


def parsed_fields(text: str) -> dict[str, Any]:
    """The fields of --extra-body. Raises UserError for what is no JSON object."""
    try:
        fields = jsonlib.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"--extra-body {text!r} is no JSON object; pass for example '{{\"top_p\": 0.9}}'")
    return fields
