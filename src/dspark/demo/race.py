"""One prompt written by two engines on one target, step by step: plain decoding, and with a drafter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Drafter
from dspark.engine.build import build_engine
from dspark.engine.detokenize import decoder_of
from dspark.engine.request import Commit, RequestStatistics, TokenTrace
from dspark.models.target import Target


@dataclass(frozen=True)
class Written:
    """One committed token as a person may look at it."""

    text: str
    slot: int | None = None  # its place in the draft, from 1; None: no draft of it was verified
    accepted: bool = False  # the drafter proposed it
    confidence: float | None = None  # of the drafter, that this slot would be accepted
    instead_of: str | None = None  # the drafter's token, where the target corrected it


@dataclass(frozen=True)
class Run:
    """A finished text: its tokens, and the seconds from the request to the last of them."""

    token_ids: tuple[int, ...]
    seconds: float
    statistics: RequestStatistics


class Lane:
    """One engine that writes one text at a time, with a clock that runs during its steps only."""

    def __init__(self, target: Target, drafter: Drafter | None, planner: str, *, compile: bool):
        self.name = type(drafter).__name__ if drafter is not None else "plain"
        self.core = build_engine(target, drafter, planner, max_running=1, prefix_caching=False, compile=compile)
        if self.core.tokenizer is None:
            raise UserError("the target has no tokenizer; save one beside its weights")
        self.tokenizer: PreTrainedTokenizerBase = self.core.tokenizer
        self.decode = decoder_of(self.tokenizer)
        self.tokens: list[int] = []
        self.written: list[Written] = []  # as `tokens`, where the request is traced
        self.seconds, self.done = 0.0, True
        self.statistics = RequestStatistics()

    def check(self, prompt: str, params: SamplingParams) -> None:
        """Raises UserError for a prompt that could not be served."""
        if not prompt:
            raise UserError("the prompt is empty; give at least one character")
        self.core.cancel(self.core.add(prompt, params))

    def begin(self, prompt: str, params: SamplingParams) -> None:
        """Take a prompt; the text before is forgotten. Raises UserError for one that cannot be served."""
        self.core.add(prompt, params)
        self.tokens, self.written, self.seconds, self.done = [], [], 0.0, False

    def step(self) -> list[Commit]:
        """One engine step."""
        before = time.perf_counter()
        commits = self.core.step()
        self.seconds += time.perf_counter() - before
        for commit in commits:
            self.tokens += commit.token_ids
            self.written += map(self._look_at, commit.trace or ())
            self.statistics = commit.statistics
            self.done = commit.finish_reason is not None
        return commits

    def run(self, prompt: str, params: SamplingParams) -> Run:
        """The whole text at once."""
        self.begin(prompt, params)
        while not self.done:
            self.step()
        return self.result()

    def result(self) -> Run:
        """What was written so far."""
        return Run(tuple(self.tokens), self.seconds, self.statistics)

    @property
    def speed(self) -> float:
        """Tokens per second of the present text."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    def _look_at(self, one: TokenTrace) -> Written:
        fell = None if one.rejected is None else self.decode([one.rejected])
        return Written(one.text, one.slot, one.kind == "accepted", one.confidence, fell)


def race(lanes: list[Lane], prompt: str, params: SamplingParams) -> Iterator[Lane]:
    """All lanes write `prompt`; the one whose clock is behind takes the next step and is yielded after it."""
    for lane in lanes:
        lane.begin(prompt, replace(params, trace=True))
    while running := [lane for lane in lanes if not lane.done]:
        lane = min(running, key=lambda lane: lane.seconds)
        lane.step()
        yield lane
