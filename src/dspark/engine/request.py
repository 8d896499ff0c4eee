"""One request: its tokens, its pages, how far they agree, and when it has said enough."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dspark.common.sampling_params import SamplingParams
from dspark.engine.detokenize import Detokenizer
from dspark.speculation.grammar import Matcher
from dspark.speculation.statistics import SpeculationStatistics

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """A committed token's log-probability under the target's raw logits, and the likeliest tokens' there."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # likeliest first


@dataclass(frozen=True)
class TokenTrace:
    """Where a committed token came from."""

    token_id: int
    text: str  # those of a commit joined are the commit's text: half a character comes with its other half
    kind: Literal["accepted", "corrected", "bonus", "plain"]  # plain: no draft was verified that round
    slot: int | None = None  # its place in the draft, from 1
    confidence: float | None = None  # the drafter's own, that this slot would stand if those before it did
    rejected: int | None = None  # the drafted token that fell here


@dataclass(frozen=True)
class Commit:
    """What one step added to one request. Texts of all commits joined are the request's text."""

    request_id: int
    token_ids: list[int]
    text: str
    accepted: int  # how many of `token_ids`, from the front, a drafter proposed
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    statistics: RequestStatistics
    trace: list[TokenTrace] | None = None  # of `token_ids`, if the request asked
    error: str | None = None  # why this request alone failed, where the reason to finish is "error"
    drafted: int = 0  # tokens proposed for this round
    verified: int = 0  # of those, checked
    prompt_logprobs: list[TokenLogprob] | None = None  # of the prompt but its first token, with the first commit


@dataclass
class RequestStatistics(SpeculationStatistics):
    """Rounds count the steps in which the request could draft; the commit that ends a prefill is not one."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache at the first admission
    preemptions: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None  # the first time it got pages
    first_token: float | None = None
    finished: float | None = None


@dataclass(eq=False)
class Request:
    """Committed tokens and the pages that hold the first `cached` of them; the last token is the anchor.

    Rolling back a rejected draft is nothing but not counting its rows into `cached`.
    """

    id: int
    params: SamplingParams
    tokens: list[int]  # the prompt, then the committed output
    prompt_length: int
    limit: int  # tokens it may reach, prompt included
    seed: int
    stop_ids: frozenset[int]
    page_row: np.ndarray  # int32: the pages, then zeros
    detokenizer: Detokenizer | None = None
    matcher: Matcher | None = None  # of a request with a grammar: where its output stands in it
    scores: list[TokenLogprob] | None = None  # of the prompt's tokens from the second on, until they are told
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`; outlives the pages
    published: int = 0
    cached: int = 0
    rounds: int = 0  # the random numbers' counter: grows with every verification, preempted or not
    decoding: bool = False  # has committed a token since its last admission, so only the anchor is uncached
    finish_reason: FinishReason | None = None
    statistics: RequestStatistics = field(default_factory=RequestStatistics)

    @property
    def uncached(self) -> int:
        """Tokens that must still go through the target, the anchor included."""
        return len(self.tokens) - self.cached

    @property
    def trouble(self) -> str | None:
        """Why its grammar cannot be followed any more."""
        return self.matcher.trouble if self.matcher is not None else None

    @property
    def output_length(self) -> int:
        """Committed tokens after the prompt: the position of the next one."""
        return len(self.tokens) - self.prompt_length

    def unscored(self, rows: int) -> range:
        """Positions among the next `rows` whose logits tell how likely the prompt's next token was, if it asked."""
        if self.scores is None:
            return range(0)
        return range(max(self.cached, len(self.scores)), min(self.cached + rows, self.prompt_length - 1))

    def append_page(self, page: int) -> None:
        """Room for one page of tokens more."""
        self.page_row[len(self.pages)] = page
        self.pages.append(page)

    def drop_pages(self) -> list[int]:
        """Forget the pages and what was in them; the caller releases them."""
        pages, self.pages = self.pages, []
        self.page_row[:] = 0
        self.cached = self.published = 0
        self.decoding = False
        return pages

    def commit(self, tokens: list[int]) -> tuple[list[int], list[str]]:
        """Take a round's tokens up to the first reason to stop; returns those taken and the text that can be shown.

        The text is in one piece, or in one for each token taken if the request is traced.
        """
        room = self.limit - len(self.tokens)
        kept = tokens[:room]
        spoken = len(kept)
        if len(tokens) >= room:
            self.finish_reason = "length"
        if not self.stop_ids.isdisjoint(kept):
            spoken = next(i for i, token in enumerate(kept) if token in self.stop_ids)
            kept = kept[: spoken + 1]
            self.finish_reason = "stop"
        if self.matcher is not None:
            kept = self._match(kept, self.matcher)
            spoken = min(spoken, len(kept))
        texts, count = self._speak(kept[:spoken])
        if count is not None:
            kept = kept[:count]
            self.finish_reason = "stop"
        texts = [*texts, *[""] * len(kept)][: len(kept)] if self.params.trace else texts
        if texts and self.finish_reason and count is None and self.detokenizer is not None:
            texts[-1] += self.detokenizer.finish()
        self.tokens += kept
        now = time.perf_counter()
        if self.statistics.first_token is None:
            self.statistics.first_token = now
        if self.finish_reason:
            self.statistics.finished = now
        return kept, texts

    def _speak(self, tokens: list[int]) -> tuple[list[str], int | None]:
        """The pieces of text that `tokens` add, and how many tokens it took if a stop string was completed."""
        if self.detokenizer is None:
            return [""], None
        if not self.params.trace:
            text, count = self.detokenizer.feed(tokens)
            return [text], count
        texts = []
        for place, token in enumerate(tokens):
            text, count = self.detokenizer.feed([token])
            texts.append(text)
            if count is not None:
                return texts, place + 1
        return texts, None

    def _match(self, tokens: list[int], matcher: Matcher) -> list[int]:
        """Move the grammar on: the tokens up to the one that completes the text, or that shows that it cannot be."""
        for count, token in enumerate(tokens, 1):
            matcher.advance(token)
            if matcher.trouble is not None:
                self.finish_reason = "error"
            elif matcher.complete:
                self.finish_reason = "stop"
            else:
                continue
            return tokens[:count]
        return tokens
