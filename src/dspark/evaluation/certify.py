"""Checks by sampling that an engine with its planner writes what its target would write alone, and how sure that is.

The same prompts are continued many times with speculation and without, and the joint laws of the first tokens are
compared. Every outcome that is common enough is a cell, all others together are one; a cell's share among the drafted
texts and among the plain ones is a fair estimate of the same number, if nothing leaks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from dspark.common.sampling_params import SamplingParams
from dspark.engine.step import EngineCore

Texts = Counter[tuple[int, ...]]
FALSE_ALARM = 1e-3  # of a whole certificate, over all its prompts
LEAST = 10  # plain texts that make a cell
SHOWN = 0.99  # confidence of the bound


@dataclass(frozen=True)
class Certificate:
    """One prompt's comparison."""

    samples: int  # texts of each kind
    cells: int
    distance: float  # of the chi-square statistic from its mean, in standard deviations
    limit: float  # a true law exceeds it with a chance of FALSE_ALARM over all prompts
    bound: float  # total variation between the two laws over the cells is below this with confidence SHOWN
    accepted: int  # drafted tokens that were accepted: with none the comparison says nothing

    @property
    def passed(self) -> bool:
        """Whether the laws could not be told apart."""
        return self.distance <= self.limit


def certify(
    speculating: EngineCore,
    plain: EngineCore,
    prompts: Sequence[str | list[int]],
    params: SamplingParams,
    *,
    samples: int,
    length: int = 2,
    tick: Callable[[int], object] = lambda done: None,
) -> list[Certificate]:
    """A certificate a prompt, from `samples` texts of each engine; `params.max_tokens` leaves room to draft in."""
    made = []
    for done, prompt in enumerate(prompts):
        counts, accepted = sample(speculating, prompt, params, samples, length)
        wanted, _ = sample(plain, prompt, params, samples, length)
        made.append(compare(counts, wanted, accepted, FALSE_ALARM / len(prompts)))
        tick(done + 1)
    return made


def sample(
    core: EngineCore, prompt: str | list[int], params: SamplingParams, samples: int, length: int
) -> tuple[Texts, int]:
    """How often each beginning of `length` tokens was written, and how many drafted tokens were accepted."""
    texts: dict[int, list[int]] = {core.add(prompt, params): [] for _ in range(samples)}
    accepted = 0
    while not core.idle:
        for commit in core.step():
            texts[commit.request_id] += commit.token_ids
            if commit.finish_reason:
                accepted += commit.statistics.accepted
    return Counter(tuple(text[:length]) for text in texts.values()), accepted


def compare(found: Texts, wanted: Texts, accepted: int, false_alarm: float) -> Certificate:
    """The two-sample chi-square test over common outcomes, and a bound on the total variation over the same cells."""
    cells = [outcome for outcome, count in wanted.items() if count >= LEAST]
    a = [found[outcome] for outcome in cells] + [found.total() - sum(found[outcome] for outcome in cells)]
    b = [wanted[outcome] for outcome in cells] + [wanted.total() - sum(wanted[outcome] for outcome in cells)]
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x + y]
    freedom = max(len(pairs) - 1, 1)
    n, m = found.total(), wanted.total()
    root = math.sqrt(n / m)
    statistic = sum((x / root - y * root) ** 2 / (x + y) for x, y in pairs)
    # Wilson and Hilferty: the cube root of a chi-square over its mean is all but normal
    spread = 2 / (9 * freedom)
    distance = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    apart = sum(abs(x / n - y / m) for x, y in pairs) / 2
    # McDiarmid: one more text moves the distance by at most 1/n or 1/m, so it exceeds its mean by little
    slack = math.sqrt((1 / n + 1 / m) * math.log(1 / (1 - SHOWN)) / 2)
    return Certificate(
        n, len(pairs), distance, NormalDist().inv_cdf(1 - false_alarm), min(apart + slack, 1.0), accepted
    )
