"""The exact joint law of a whole system of two requests that share a planner, over as many rounds as they take.

Everything a planner may ever have seen is a branch: drafts that were rejected or never verified, both requests'
confidences, what became of them. Each branch has its own copy of the planner, so what it learns is enumerated too.

R = 2 requests, K draft slots, V = 2 tokens.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
import torch
from exact import System, committed, drafts, target_laws, volume
from tiny_world import ToyDrafter

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft
from dspark.ops.sampling import Shaping
from dspark.speculation.cost import StepCost
from dspark.speculation.draft_sampler import DraftSampler
from dspark.speculation.noise import RoundNoise
from dspark.speculation.planner import Planner
from dspark.speculation.round import Outcome, Round
from dspark.speculation.survival import survival
from dspark.speculation.verify import verify

V, LENGTH = 2, 2
PROMPTS = ((0,), (1,))
STAIRS = StepCost.of_table([1.0, 1.0, 1.35, 1.35, 1.4, 2.3, 2.3, 2.4, 3.6])
CLIFF = StepCost.of_table([1.0, 1.0, 1.68, 1.7, 1.75, 1.8, 1.9, 2.0, 2.0])  # one more row never pays, several may
Texts = tuple[tuple[int, ...], tuple[int, ...]]
Law = dict[Texts, float]

_random = torch.Generator().manual_seed(11)
TARGET_VV = torch.randn(V, V, generator=_random, dtype=torch.float64)


def target_logits(tokens: Sequence[int]) -> torch.Tensor:
    """After `tokens`; only the last one matters."""
    return TARGET_VV[tokens[-1]]


class Telling(ToyDrafter):
    """Confidences that tell what was drafted before them, and how much of it there is when it stops early."""

    bias_VV = torch.randn(V, V, generator=_random, dtype=torch.float64)
    confidence_table = ((0.8, 0.55), (0.95, 0.05), (0.9, 0.2))

    def __init__(self, stops_below: float = 0.0) -> None:
        self.stops_below = stops_below

    def logits(self, committed, drafted):
        return self.bias_VV[[*committed, *drafted][-1]]

    def confidence(self, committed, drafted):
        return self.confidence_table[len(drafted)][[*committed, *drafted][-1]]

    def propose(self, committed, sampler, slots):
        draft = super().propose(committed, sampler, slots)
        below_RK = survival(draft.confidence_RK) <= self.stops_below  # slot k is drafted if none up to k is low
        length_R = [next((k for k, low in enumerate(row) if low), slots) for row in below_RK.tolist()]
        return Draft(draft.token_RK, draft.probability_RKV, draft.confidence_RK, [max(1, n) for n in length_R])


@dataclass
class Pair:
    """Two requests, one planner."""

    planner: Planner
    slots: int = 2
    length: int = LENGTH
    drafter: Telling = field(default_factory=Telling)
    _blocks: dict = field(default_factory=dict)
    _laws: dict = field(default_factory=dict)

    def system(self, request: int) -> System:
        return System(target_logits, self.drafter, self.planner, SamplingParams(), self.slots, PROMPTS[request])

    def law(self) -> Law:
        """The joint law of both requests' first `length` tokens under the rejection rule."""
        law: Law = defaultdict(float)
        open_states: list[tuple[Texts, Planner, float]] = [(((), ()), self.planner, 1.0)]
        while open_states:
            texts, planner, probability = open_states.pop()
            for longer, after, weight in self._round(texts, planner):
                if min(map(len, longer)) >= self.length:
                    law[longer[0][: self.length], longer[1][: self.length]] += probability * weight
                else:
                    open_states.append((longer, after, probability * weight))
        return law

    def _round(self, texts: Texts, planner: Planner):
        running = [r for r in (0, 1) if len(texts[r]) < self.length]
        blocks = [self._drafts(r, texts[r]) for r in running]
        asked = _copy(planner)
        slots = asked.slots(round_of(texts, running, [self.slots] * len(running)))
        for choice in np.ndindex(*(len(paths) for paths, _ in blocks)):
            chance = float(np.prod([volume(paths[i]) for (paths, _), i in zip(blocks, choice, strict=True)]))
            after = _copy(asked)
            rows = [(draft.confidence_RK[i], draft.length_R[i]) for (_, draft), i in zip(blocks, choice, strict=True)]
            plan, tell = planned(after, texts, running, slots, rows)
            options = [self._law(r, texts[r], i, n) for r, i, n in zip(running, choice, plan, strict=True)]
            for ends in np.ndindex(*(len(option) for option in options)):
                longer, weight, accepted = list(texts), chance, []
                for r, option, end in zip(running, options, ends, strict=True):
                    tokens, share = option[end]
                    longer[r] = (*texts[r], *tokens)
                    weight *= share
                    accepted.append(len(tokens) - 1)
                told = _copy(after)
                told.observe(tell(accepted))
                yield (longer[0], longer[1]), told, weight

    def _drafts(self, request: int, text: tuple[int, ...]):
        if (request, text) not in self._blocks:
            self._blocks[request, text] = drafts(self.system(request), text)
        return self._blocks[request, text]

    def _law(self, request: int, text: tuple[int, ...], path: int, length: int):
        key = (request, text, length)
        if key not in self._laws:
            draft = self._drafts(request, text)[1]
            plan = [min(length, n) for n in draft.length_R]
            self._laws[key] = [list(law.items()) for law in committed(self.system(request), text, draft, plan)]
        return self._laws[key][path]


def round_of(texts: Texts, running: Sequence[int], limit_R: Sequence[int]) -> Round:
    context = [len(PROMPTS[r]) + len(texts[r]) for r in running]
    return Round(limit_R, (), list(running), context, [SamplingParams()] * len(running))


class Ending:
    """A planner that also ends the block of all requests together, by what both have drafted before the slot."""

    def __init__(self, planner: Planner, below: float) -> None:
        self.planner = planner
        self.below = below

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.planner, name)

    def going_on(self, round: Round, survival_R: np.ndarray, drawn: int) -> bool:
        return float(survival_R.sum()) > self.below


def ended(planner: Planner, texts: Texts, running, slots, a_RK: np.ndarray) -> int:
    """How many slots a sequential drafter draws for everyone before the planner ends the block."""
    decide, most = getattr(planner, "going_on", None), max(slots)
    if decide is None:
        return most
    drafting = [r for r, n in enumerate(slots) if n]
    round = round_of(texts, running, [7] * len(running)).drafted(slots, slots)
    return next((n for n in range(1, most) if not decide(round, a_RK[drafting, n - 1], n)), most)


def planned(planner: Planner, texts: Texts, running, slots, rows) -> tuple[list[int], Callable[[list[int]], Outcome]]:
    """The plan for what was drafted, and the outcome to tell once it is known what was accepted."""
    limit_R = [min(n, most) for (_, n), most in zip(rows, slots, strict=True)]
    if not any(slots):
        round = round_of(texts, running, limit_R)
        return [0] * len(running), lambda accepted: Outcome(round, [0] * len(running), accepted, 1.0)
    a_RK = survival(torch.stack([confidence for confidence, _ in rows]))[:, : max(slots)].numpy()
    end = ended(planner, texts, running, slots, a_RK)
    limit_R = [min(n, end) for n in limit_R]
    a_RK = np.where(np.arange(max(slots)) < end, a_RK, 0.0)
    round = round_of(texts, running, [7] * len(running)).drafted(limit_R, slots)
    plan = planner.plan(round, a_RK)
    return plan, lambda accepted: Outcome(round, plan, accepted, 1.0 + 0.1 * sum(plan), a_RK)


def plain_law(length: int = LENGTH) -> Law:
    """The target's own: the requests are independent."""
    table = TARGET_VV.softmax(-1)
    each = []
    for prompt in PROMPTS:
        law = {(): 1.0}
        for _ in range(length):
            law = {(*t, v): w * float(table[(*prompt, *t)[-1], v]) for t, w in law.items() for v in range(V)}
        each.append(law)
    return {(a, b): wa * wb for a, wa in each[0].items() for b, wb in each[1].items()}


def distance(found: Law, wanted: Law) -> float:
    return max(abs(found.get(key, 0.0) - wanted.get(key, 0.0)) for key in found.keys() | wanted.keys())


class CoupledPair(Pair):
    """The same system under the coupled rule, by enumerating the noise of every output position.

    With two words the race between exponentials e is decided by u = e_0 / (e_0 + e_1), which is uniform: the law
    (p, 1 - p) takes word 0 where u < p. Between the p and q that can occur, nothing changes. A position keeps its
    noise from round to round; a bonus token past `length` is not looked at, so any noise will do for it.
    """

    def law(self) -> Law:
        assert self.slots >= self.length, "a bonus token within the length would need noise of its own"
        law: Law = defaultdict(float)
        states = [(((), ()), self.planner, {((), ()): 1.0})]
        while states:
            texts, planner, chances = states.pop()
            for longer, after, left in self._coupled_round(texts, planner, chances):
                if min(map(len, longer)) >= self.length:
                    law[longer[0][: self.length], longer[1][: self.length]] += sum(left.values())
                else:
                    states.append((longer, after, left))
        return law

    def _coupled_round(self, texts: Texts, planner: Planner, chances: dict):
        """Branches by what was drafted and committed; `chances` are of the noise known of the positions to come."""
        running = [r for r in (0, 1) if len(texts[r]) < self.length]
        asked = _copy(planner)
        slots = asked.slots(round_of(texts, running, [self.slots] * len(running)))
        by_draft: dict = defaultdict(lambda: defaultdict(float))
        for known, chance in chances.items():
            wholes = [self._completed(known[r]) if r in running else [((), 1.0)] for r in (0, 1)]
            for (noise_a, share_a), (noise_b, share_b) in product(*wholes):
                noise = (noise_a, noise_b)
                tokens = tuple(tuple(self._block(r, texts[r]).token_RK[self._row(noise[r])].tolist()) for r in running)
                by_draft[tokens][noise] += chance * share_a * share_b
        for noises in by_draft.values():
            after, first = _copy(asked), next(iter(noises))
            blocks = [(self._block(r, texts[r]), self._row(first[r])) for r in running]
            rows = [(draft.confidence_RK[i], draft.length_R[i]) for draft, i in blocks]
            plan, tell = planned(after, texts, running, slots, rows)
            by_end: dict = defaultdict(lambda: defaultdict(float))
            for noise, chance in noises.items():
                ends = [
                    self._committed(r, texts[r], n)[self._row(noise[r])] for r, n in zip(running, plan, strict=True)
                ]
                left = [(), ()]
                for r, tokens in zip(running, ends, strict=True):
                    left[r] = noise[r][len(tokens) :]
                by_end[tuple(map(tuple, ends))][left[0], left[1]] += chance
            for ends, left in by_end.items():
                told, longer = _copy(after), list(texts)
                for r, tokens in zip(running, ends, strict=True):
                    longer[r] = (*texts[r], *tokens)
                told.observe(tell([len(tokens) - 1 for tokens in ends]))
                yield (longer[0], longer[1]), told, left

    def _completed(self, known: tuple[int, ...]):
        more = list(product(range(len(SHARES)), repeat=self.slots - len(known)))
        return [((*known, *pieces), float(np.prod([SHARES[i] for i in pieces]))) for pieces in more]

    def _row(self, noise: tuple[int, ...]) -> int:
        return sum(piece * len(SHARES) ** k for k, piece in enumerate(reversed(noise)))

    def _noise(self) -> RoundNoise:
        u_RK = torch.tensor(list(product(MIDDLES, repeat=self.slots)), dtype=torch.float64)
        u_RK = torch.cat([u_RK, torch.full((len(u_RK), 1), 0.5)], 1)
        zeros, half = [0] * len(u_RK), torch.full((len(u_RK), self.slots), 0.5, dtype=torch.float64)
        rows = list(range(len(u_RK)))
        exponential_CKV = torch.stack([u_RK, 1 - u_RK], -1)
        return RoundNoise(half, half, half[:, 0], rows, zeros, zeros, _exponential_CKV=exponential_CKV)

    def _block(self, request: int, text: tuple[int, ...]) -> Draft:
        key = (request, text)
        if key not in self._blocks:
            noise = self._noise()
            sampler = DraftSampler(Shaping.of([SamplingParams()] * len(noise.seeds)), noise)
            tokens = [[*PROMPTS[request], *text]] * len(noise.seeds)
            self._blocks[key] = self.drafter.propose(tokens, sampler, self.slots)
        return self._blocks[key]

    def _committed(self, request: int, text: tuple[int, ...], length: int) -> list[list[int]]:
        key = (request, text, length)
        if key not in self._laws:
            draft = self._block(request, text)
            plan = [min(length, n) for n in draft.length_R]
            laws_BV = target_laws(self.system(request), text, draft, plan)
            self._laws[key] = verify(draft, plan, laws_BV, self._noise()).tokens
        return self._laws[key]


CUTS = sorted({0.0, 1.0, *TARGET_VV.softmax(-1)[:, 0].tolist(), *Telling.bias_VV.softmax(-1)[:, 0].tolist()})
MIDDLES, SHARES = [(a + b) / 2 for a, b in pairwise(CUTS)], [b - a for a, b in pairwise(CUTS)]


def _copy(planner: Planner) -> Planner:
    prices = getattr(planner, "prices", None)
    return copy.deepcopy(planner, {id(prices): prices})
