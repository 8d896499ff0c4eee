"""Offers a load to a server: requests when they are due, no more at a time than allowed, and what came of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark.evaluation.client import ACCEPTED, DRAFTED, DRAFTS, Answer, Client, Question

SYLLABLES = ("ba", "de", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "ze")


@dataclass(frozen=True)
class Offered:
    """A load and what came of it."""

    answers: Sequence[Answer]
    duration: float  # s, from the first request to the last answer
    speculation: dict[str, Any] | None  # what the server counted meanwhile


async def offer(
    client: Client,
    questions: Sequence[Question],
    *,
    most: int | None = None,
    warmups: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> Offered:
    """Send every question when it is due; `most` at a time, so that one may leave later than it was due.

    `warmups` of them go out before, all at once, and are not counted.
    """
    places = asyncio.Semaphore(most) if most else contextlib.nullcontext()

    async def one(question: Question) -> Answer:
        async with places:
            answer = await client.ask(question)
        tick()
        return answer

    await asyncio.gather(*(one(question) for question in questions[:warmups]))
    before = await client.speculation()
    began = time.perf_counter()
    tasks = []
    for question in questions:
        wait = began + question.due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(question)))
    answers = await asyncio.gather(*tasks)
    duration = time.perf_counter() - began
    return Offered(answers, duration, counted(before, await client.speculation()))


def counted(before: dict[str, list[float]] | None, after: dict[str, list[float]] | None) -> dict[str, Any] | None:
    """What happened between two readings of a server's counts, in `vllm bench serve`'s names."""
    if before is None or after is None:
        return None

    def grown(name: str) -> list[float]:
        old = before.get(name, [])
        return [value - (old[i] if i < len(old) else 0.0) for i, value in enumerate(after.get(name, [0.0]))]

    drafts, drafted, accepted = (sum(grown(name)) for name in (DRAFTS, DRAFTED, ACCEPTED))
    if not drafts or not drafted:
        return None
    by_position = grown("num_accepted_tokens_per_pos")
    return {
        "spec_decode_acceptance_rate": 100 * accepted / drafted,
        "spec_decode_acceptance_length": 1 + accepted / drafts,
        "spec_decode_num_drafts": int(drafts),
        "spec_decode_draft_tokens": int(drafted),
        "spec_decode_accepted_tokens": int(accepted),
        "spec_decode_per_position_acceptance_rates": [count / drafts for count in by_position],
    }


def synthetic(lengths: Sequence[tuple[int, int]], seed: int) -> list[str]:
    """Prompts of invented words, LOW to HIGH of them each: no server has one in its prefix cache."""
    random = np.random.default_rng(seed)
    prompts = []
    for low, high in lengths:
        length = int(random.integers(low, high + 1))
        syllables = random.choice(SYLLABLES, (length, 3))
        prompts.append(" ".join("".join(word) for word in syllables.tolist()))
    return prompts


def questions_of(
    prompts: Sequence[str], dues: Sequence[float], tokens: Sequence[tuple[int, int]], seed: int
) -> list[Question]:
    """A question for every due time: prompts in turn, lengths drawn from a (LOW, HIGH) each."""
    random = np.random.default_rng([seed, 1])
    lengths = [int(random.integers(low, high + 1)) for low, high in tokens]
    return [
        Question(prompts[number % len(prompts)], length, due)
        for number, (due, length) in enumerate(zip(dues, lengths, strict=True))
    ]
