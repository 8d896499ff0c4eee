"""Measures plain decoding against DSpark on the same prompts, and compares the texts token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from dspark.common.sampling_params import SamplingParams
from dspark.demo.race import Lane, Run, Written
from dspark.speculation.statistics import SpeculationStatistics, total


@dataclass(frozen=True)
class Difference:
    """Where two texts part: the token of each, and how likely each run's own forward found its two best there."""

    prompt: int
    position: int
    plain: tuple[tuple[str, float], ...]  # (token, log-probability), likeliest first
    dspark: tuple[tuple[str, float], ...]


@dataclass
class Outcome:
    """All runs of one prompt; what was written is the first DSpark run's."""

    prompt: str
    written: list[Written]
    plain: list[Run]
    dspark: list[Run]

    @property
    def same(self) -> bool:
        """Whether every run gave the same tokens."""
        return len({run.token_ids for run in [*self.plain, *self.dspark]}) == 1


@dataclass
class Tally:
    """The outcomes of all prompts. A speed is all tokens over the sum of the prompts' median times."""

    outcomes: list[Outcome]

    @property
    def plain_speed(self) -> float:
        """Tokens per second of plain decoding, prefill included."""
        return _speed([outcome.plain for outcome in self.outcomes])

    @property
    def dspark_speed(self) -> float:
        """Tokens per second with the drafter, prefill included."""
        return _speed([outcome.dspark for outcome in self.outcomes])

    @property
    def same(self) -> bool:
        """Whether all texts are the same, token by token."""
        return all(outcome.same for outcome in self.outcomes)

    @property
    def statistics(self) -> SpeculationStatistics:
        """What speculation did, over one run of each prompt."""
        return total(outcome.dspark[0].statistics for outcome in self.outcomes)

    @property
    def tokens(self) -> int:
        """Tokens written in one run of each prompt."""
        return sum(len(outcome.dspark[0].token_ids) for outcome in self.outcomes)


def measure(
    plain: Lane, dspark: Lane, outcomes: Sequence[Outcome], params: SamplingParams, *, rounds: int
) -> Iterator[None]:
    """Add `rounds` timed runs of both kinds to every outcome, plain and DSpark in turn; yields after each pair."""
    for _ in range(rounds):
        for outcome in outcomes:
            outcome.plain.append(plain.run(outcome.prompt, params))
            outcome.dspark.append(dspark.run(outcome.prompt, params))
            yield


def first_difference(
    plain: Lane, dspark: Lane, outcomes: Sequence[Outcome], params: SamplingParams
) -> Difference | None:
    """The first place where a prompt's texts part, with both runs' two likeliest tokens there; None if none does."""
    for index, outcome in enumerate(outcomes):
        if not outcome.same:
            watching = replace(params, logprobs=2)
            sides = [_tops(lane, outcome.prompt, watching) for lane in (plain, dspark)]
            pairs = zip(*sides, strict=False)
            position = next((i for i, (a, b) in enumerate(pairs) if a[0] != b[0]), None)
            if position is not None:
                return Difference(index, position, sides[0][position][1], sides[1][position][1])
            return Difference(index, -1, (), ())  # this time they agree
    return None


def _tops(lane: Lane, prompt: str, params: SamplingParams) -> list[tuple[int, tuple[tuple[str, float], ...]]]:
    lane.begin(prompt, params)
    found = []
    while not lane.done:
        for commit in lane.step():
            for entry in commit.logprobs or ():
                found.append((entry.token_id, tuple((lane.decode([token]), value) for token, value in entry.top)))
    return found


def _speed(runs_of_prompts: Sequence[Sequence[Run]]) -> float:
    tokens = sum(len(runs[0].token_ids) for runs in runs_of_prompts)
    seconds = sum(median(run.seconds for run in runs) for runs in runs_of_prompts)
    return tokens / seconds if seconds else 0.0
