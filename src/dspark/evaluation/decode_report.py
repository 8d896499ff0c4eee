"""Runs a decoding comparison as a person asked for it; shows a table and writes JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from dspark.common.chat import render_chat
from dspark.common.collector import freeze_startup
from dspark.common.errors import UserError
from dspark.common.files import replacing_file
from dspark.common.log import seconds_of
from dspark.common.provenance import provenance
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Drafter
from dspark.drafters.registry import load_drafter
from dspark.engine.build import build_engine
from dspark.engine.step import EngineCore
from dspark.evaluation.decode import (
    Contender,
    Texts,
    endless,
    engine_contender,
    interleave,
    library_contender,
    same_texts,
)
from dspark.models.loading import load_causal_lm, load_tokenizer
from dspark.models.target import Target

PLAIN = "engine, plain"
LOOKUP_TOKENS = 10  # transformers' own suggestion for prompt lookup


@dataclass(frozen=True)
class DecodeSettings:
    """What is compared, and how."""

    target: str
    drafter: str
    planner: str = "full"
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None
    batch: int = 1
    rounds: int = 3
    assistant: str | None = None
    library: bool = True
    compile: bool = True
    dtype: str = "auto"
    device: str = "auto"


def compare_decoding(settings: DecodeSettings, prompts: list[str], output: Path | None = None) -> dict[str, Any]:
    """Measure, print the table, write `output`; returns what it wrote."""
    console = Console(highlight=False)
    params = SamplingParams(
        max_tokens=settings.max_tokens, temperature=settings.temperature, seed=settings.seed, ignore_eos=True
    )
    tokenizer = load_tokenizer(settings.target)
    target = Target.load(settings.target, dtype=settings.dtype, device=settings.device)
    tokens = [encode(tokenizer, text) for text in prompts]
    check_room(tokens, settings.max_tokens, target.context_limit)
    cores = engines(settings, target)
    with seconds_of(console, "compiling the forwards, once for this machine") as tick:
        for core in cores:
            core.wait_compiled(tick)
    names = (PLAIN, f"engine, {type(cores[1].drafter).__name__}")
    contenders = [engine_contender(name, core, params) for name, core in zip(names, cores, strict=True)]
    if settings.library:
        contenders += library(settings, params)
    freeze_startup()
    with Progress(console=console, transient=True) as progress:
        batches = -(-len(tokens) // settings.batch)
        task = progress.add_task("measuring", total=len(contenders) * (1 + settings.rounds * batches))
        for _ in interleave(contenders, tokens, batch=settings.batch, rounds=settings.rounds):
            progress.advance(task)
    result = {
        "settings": asdict(settings),
        "prompts": len(prompts),
        "where": provenance(target.device),
        "contenders": [row(contender, contenders[0]) for contender in contenders],
    }
    console.print(table(result))
    if output is not None:
        with replacing_file(output) as fresh:
            fresh.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {output}", soft_wrap=True)
    return result


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A prompt's tokens: as a user's turn where there is a chat template, else as plain text."""
    if tokenizer.chat_template:
        return render_chat(tokenizer, [{"role": "user", "content": text}])
    return list(tokenizer(text)["input_ids"])


def check_room(prompts: Texts, max_tokens: int, context: int) -> None:
    """Raises UserError where a prompt and what it is to be continued with do not fit the context."""
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_tokens > context:
        raise UserError(
            f"a prompt of {longest} tokens and --max-tokens {max_tokens} exceed the context of {context}; "
            "shorten one of them"
        )


def engines(settings: DecodeSettings, target: Target) -> list[EngineCore]:
    """Plain decoding and speculation, on the same target, each with its own pages."""
    proposer = load_drafter(settings.drafter, target)

    def engine(drafter: Drafter | None, planner: str) -> EngineCore:
        return build_engine(
            target,
            drafter,
            planner,
            max_running=settings.batch,
            prefix_caching=False,
            compile=settings.compile,
        )

    return [engine(None, "none"), engine(proposer, settings.planner)]


def library(settings: DecodeSettings, params: SamplingParams) -> list[Contender]:
    """`transformers` generate as people use it; its speculation knows one prompt at a time."""

    def load(source: str) -> Any:
        return endless(load_causal_lm(source, dtype=settings.dtype, device=settings.device))

    model = load(settings.target)
    ways: dict[str, Callable[[], dict[str, Any]]] = {"generate": dict}
    if settings.batch == 1:
        if settings.assistant is not None:
            ways["assisted"] = lambda: {"assistant_model": load(settings.assistant or "")}
        ways["prompt lookup"] = lambda: {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    return [library_contender(f"transformers, {name}", model, params, **way()) for name, way in ways.items()]


def row(contender: Contender, plain: Contender) -> dict[str, Any]:
    """One contender's numbers."""
    statistics = contender.statistics
    texts: list[Texts] = [contender.texts[index] for index in sorted(contender.texts)]
    return {
        "name": contender.name,
        "tokens": contender.tokens,
        "tokens_per_second": contender.speed,
        "decode_tokens_per_second": contender.decode_speed,
        "speed_up": contender.speed / plain.speed,
        "tau": statistics.tokens_per_round if statistics.drafted else None,
        "acceptance_by_position": statistics.conditional_acceptance,
        "same_texts_as_plain": same_texts(contender, plain),
        "texts": sum(len(batch) for batch in texts),
        "seconds": [contender.seconds[index] for index in sorted(contender.seconds)],
    }


def table(result: dict[str, Any]) -> Table:
    """The comparison for a person."""
    settings, where = result["settings"], result["where"]
    title = (
        f"{result['prompts']} prompts, {settings['max_tokens']} tokens each, temperature {settings['temperature']:g}, "
        f"batch {settings['batch']}, medians of {settings['rounds']}; {where['device']}"
    )
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for name in ("tokens/s", "× plain", "after prefill", "× plain", "τ", "same text as plain"):
        shown.add_column(name, justify="right")
    plain = result["contenders"][0]["decode_tokens_per_second"]
    for line in result["contenders"]:
        speed = line["decode_tokens_per_second"]
        decode = (f"{speed:.1f}", f"{speed / plain:.2f}") if speed is not None else ("-", "-")
        tau = f"{line['tau']:.2f}" if line["tau"] else "-"
        same = f"{line['same_texts_as_plain']} of {line['texts']}"
        whole = (f"{line['tokens_per_second']:.1f}", f"{line['speed_up']:.2f}")
        shown.add_row(line["name"], *whole, *decode, tau, same)
    return shown
