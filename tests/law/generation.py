"""The fast path end to end on the tiny world: many requests in one batch, through the real sampler, planner, verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tiny_world import ToyDrafter, V, target_logits

from dspark.common.sampling_params import SamplingParams
from dspark.ops.history import History
from dspark.ops.sampling import Shaping, shape
from dspark.speculation.draft_sampler import DraftSampler
from dspark.speculation.noise import RoundNoise
from dspark.speculation.planner import Planner
from dspark.speculation.round import Round
from dspark.speculation.survival import survival
from dspark.speculation.verify import verify


@dataclass
class Request:
    params: SamplingParams
    prompt: Sequence[int]
    seed: int
    counter: int = 0
    output: list[int] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return self.params.max_tokens - len(self.output)


def noise_of(requests: Sequence[Request], slots: int) -> RoundNoise:
    return RoundNoise.of(
        [r.seed for r in requests],
        [r.counter for r in requests],
        [len(r.output) for r in requests],
        [r.params.coupled for r in requests],
        slots=slots,
        greedy=[r.params.temperature == 0 for r in requests],
    )


def step(requests: Sequence[Request], drafter: ToyDrafter | None, planner: Planner, slots: int) -> None:
    """One round of all requests, as an engine runs it."""
    shaping = Shaping.of([r.params for r in requests])
    noise = noise_of(requests, slots)
    history = None
    if shaping.penalized:
        history = History.of([r.prompt for r in requests], [r.output for r in requests], V)
    draft, limits, plan = None, [0] * len(requests), [0] * len(requests)
    if drafter is not None:
        committed = [[*r.prompt, *r.output] for r in requests]
        draft = drafter.propose(committed, DraftSampler(shaping, noise, history), slots)
        limits = [min(n, r.missing - 1) for n, r in zip(draft.length_R, requests, strict=True)]
        plan = planner.plan(Round(limits), survival(draft.confidence_RK))
    logits = []
    for i, r in enumerate(requests):
        tokens = [*r.prompt, *r.output, *(draft.token_RK[i].tolist() if draft is not None else [])]
        end = len(r.prompt) + len(r.output)
        logits += [target_logits(tokens[: end + k]) for k in range(1 + plan[i])]
    rows = history.rows(plan, draft.token_RK if draft is not None else None) if history is not None else None
    target_BV = shape(torch.stack(logits), shaping.repeat([1 + n for n in plan]), rows)
    for request, tokens in zip(requests, verify(draft, plan, target_BV, noise).tokens, strict=True):
        request.output += tokens
        request.counter += 1


def generate(
    requests: Sequence[Request],
    drafter: ToyDrafter | None,
    planner: Planner,
    slots: int = 3,
    admit: Callable[[int], int] = lambda round_number: 1 << 30,
) -> list[list[int]]:
    """Run to the end; `admit(round)` says how many of the unfinished requests are in the batch of that round."""
    round_number = 0
    while running := [r for r in requests if r.missing]:
        step(running[: admit(round_number)], drafter, planner, slots)
        round_number += 1
    return [r.output for r in requests]
