"""The exact law of what the real sampler, planner and `verify` commit, by integrating over their uniforms.

Everything they do is piecewise constant in each uniform. The pieces' ends are known from p and q; the code runs at
both ends of every piece, must agree there, and the piece's length is its probability. Nothing of the rule is assumed:
where the code put its steps elsewhere, the two ends differ or the law comes out wrong.

R requests (one per piece of the product of all uniforms), K block slots, V vocabulary, B target rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft
from dspark.ops.history import History
from dspark.ops.sampling import Shaping, shape
from dspark.speculation.draft_sampler import DraftSampler
from dspark.speculation.grammar import Guide, Matcher
from dspark.speculation.noise import RoundNoise
from dspark.speculation.planner import Planner
from dspark.speculation.round import Round
from dspark.speculation.survival import survival
from dspark.speculation.verify import verify

Piece = tuple[float, float]
Outcome = tuple[int, ...]


@dataclass
class System:
    """One request's whole loop: models, planner and parameters."""

    target: Callable[[Sequence[int]], Tensor]  # tokens -> logits [V]
    drafter: object | None  # has propose(committed, sampler, slots)
    planner: Planner
    params: SamplingParams
    slots: int = 2
    prompt: Sequence[int] = (2, 0)
    matcher: Callable[[Sequence[int]], Matcher] | None = None  # output -> where it stands in the grammar
    guide: type[Guide] = Guide


def pieces(breakpoints: Sequence[float]) -> list[Piece]:
    """(0, 1) cut at the breakpoints; slivers of rounding dropped."""
    ends = sorted({0.0, 1.0, *(b for b in breakpoints if 0.0 < b < 1.0)})
    return [(a, b) for a, b in pairwise(ends) if b - a > 1e-14]


def at(piece: Piece, side: float) -> float:
    """A point just inside one end of the piece."""
    low, high = piece
    inset = max((high - low) * 1e-9, 1e-15)
    return low + inset if side == 0 else high - inset


def noise_of(draft_RK: list[list[float]], accept_RK: list[list[float]], final_R: list[float]) -> RoundNoise:
    f64 = torch.float64
    requests, zeros = len(final_R), [0] * len(final_R)
    draft = torch.tensor(draft_RK, dtype=f64).view(requests, -1)
    accept = torch.tensor(accept_RK, dtype=f64).view(requests, -1)
    return RoundNoise(draft, accept, torch.tensor(final_R, dtype=f64), [], zeros, zeros)


def propose(system: System, output: Sequence[int], draft_RK: list[list[float]]) -> Draft:
    """The drafter's blocks for R copies of one request that differ in their uniforms only."""
    requests = len(draft_RK)
    full = [[*row, *[0.5] * (system.slots - len(row))] for row in draft_RK]
    shaping = Shaping.of([system.params] * requests)
    noise, guide = noise_of(full, full, [0.5] * requests), guide_of(system, output, requests)
    sampler = DraftSampler(shaping, noise, history_of(system, output, requests), guide)
    draft = system.drafter.propose([[*system.prompt, *output]] * requests, sampler, system.slots)
    return draft if guide is None else guide.follow(draft)


def guide_of(system: System, output: Sequence[int], requests: int) -> Guide | None:
    return system.guide([system.matcher(output) for _ in range(requests)]) if system.matcher is not None else None


def history_of(system: System, output: Sequence[int], requests: int) -> History | None:
    if not system.params.penalized:
        return None
    width = len(system.target([*system.prompt, *output]))
    return History.of([system.prompt] * requests, [output] * requests, width)


def draft_pieces(system: System, output: Sequence[int]) -> list[list[Piece]]:
    """The pieces of the draft uniforms: one list of K pieces for every block that can be drafted."""
    paths: list[list[Piece]] = [[]]
    for slot in range(system.slots):
        draft = propose(system, output, [[at(piece, 0) for piece in path] for path in paths])
        cumulative = draft.probability_RKV[:, slot].cumsum(-1).tolist()
        paths = [[*path, piece] for path, row in zip(paths, cumulative, strict=True) for piece in pieces(row)]
    return paths


def target_laws(system: System, output: Sequence[int], draft: Draft | None, plan: list[int]) -> Tensor:
    """The shaped target rows of R copies of one request with different drafts: [B, V], request-major."""
    logits = []
    for r, length in enumerate(plan):
        drafted = draft.token_RK[r].tolist() if draft is not None else []
        logits += [system.target([*system.prompt, *output, *drafted[:k]]) for k in range(1 + length)]
    logits_BV, guide = torch.stack(logits), guide_of(system, output, len(plan))
    if guide is not None:
        for r, path in guide.paths.items():
            for k in range(plan[r]):
                path.take(int(draft.token_RK[r, k]))
        logits_BV = guide.target_logits(logits_BV, plan)
    shaping = Shaping.of([system.params] * len(plan)).repeat([1 + length for length in plan])
    history = history_of(system, output, len(plan))
    rows = history.rows(plan, draft.token_RK if draft is not None else None) if history is not None else None
    return shape(logits_BV, shaping, rows)


def round_law(system: System, output: Sequence[int]) -> dict[Outcome, float]:
    """The law of the tokens that one round commits after `output`."""
    paths, draft = drafts(system, output)
    if draft is None:
        plan = system.planner.plan(Round([0]), None)
    else:
        plan = system.planner.plan(Round(draft.length_R), survival(draft.confidence_RK))
    law: dict[Outcome, float] = defaultdict(float)
    for path, found in zip(paths, committed(system, output, draft, plan), strict=True):
        for tokens, weight in found.items():
            law[tokens] += volume(path) * weight
    return law


def drafts(system: System, output: Sequence[int]) -> tuple[list[list[Piece]], Draft | None]:
    """Every block that can be drafted after `output`: the pieces of its uniforms, and all of them as one draft."""
    if system.drafter is None:
        return [[]], None
    paths = draft_pieces(system, output)
    draft = propose(system, output, [[at(piece, 0) for piece in path] for path in paths])
    other = propose(system, output, [[at(piece, 1) for piece in path] for path in paths])
    assert torch.equal(draft.token_RK, other.token_RK), "a draft token changes inside a piece of its uniform"
    return paths, draft


def volume(path: Sequence[Piece]) -> float:
    """The probability of a product of pieces."""
    return math.prod(high - low for low, high in path)


def committed(
    system: System, output: Sequence[int], draft: Draft | None, plan: list[int]
) -> list[dict[Outcome, float]]:
    """For each block of `draft`, verified as `plan` says: the law of what `verify` commits."""
    rows = target_laws(system, output, draft, plan).split([1 + length for length in plan])
    cases = []  # (path, accept pieces, final piece)
    for path, length in enumerate(plan):
        p, tokens = rows[path], draft.token_RK[path].tolist() if draft is not None else []
        q = draft.probability_RKV[path] if draft is not None else p[:0]
        ratio = [float(p[k, tokens[k]] / q[k, tokens[k]]) for k in range(length)]
        excess = [(p[k] - q[k]).clamp(min=0) for k in range(length)] + [p[length]]
        steps = [float(end) for law in excess for end in (law.cumsum(0) / law.sum()).nan_to_num(0)]
        accept = [pieces([x]) for x in ratio] + [[(0.0, 1.0)]] * (system.slots - length)
        cases += [(path, chosen, final) for chosen in product(*accept) for final in pieces(steps)]
    return _integrate(system, output, draft, plan, cases)


def _integrate(
    system: System,
    output: Sequence[int],
    draft: Draft | None,
    plan: list[int],
    cases: list[tuple[int, tuple[Piece, ...], Piece]],
) -> list[dict[Outcome, float]]:
    """Run `verify` on every case at both ends of its pieces; by path, add up the volumes of equal outcomes."""
    index = [path for path, _, _ in cases]
    many = None
    if draft is not None:
        lengths = [draft.length_R[i] for i in index]
        many = Draft(draft.token_RK[index], draft.probability_RKV[index], draft.confidence_RK[index], lengths)
    plans = [plan[i] for i in index]
    target_BV = target_laws(system, output, many, plans)
    sides = []
    for side in (0, 1):
        accept_RK = [[at(piece, side) for piece in chosen] for _, chosen, _ in cases]
        noise = noise_of(accept_RK, accept_RK, [at(final, side) for _, _, final in cases])
        verdict = verify(many, plans, target_BV, noise)
        assert [len(tokens) for tokens in verdict.tokens] == [n + 1 for n in verdict.accepted_R]
        sides.append(verdict.tokens)
    assert sides[0] == sides[1], "a committed token changes inside a piece"
    laws: list[dict[Outcome, float]] = [defaultdict(float) for _ in plan]
    for (path, chosen, final), tokens in zip(cases, sides[0], strict=True):
        laws[path][tuple(tokens)] += volume((*chosen, final))
    return laws


def joint_law(system: System, length: int = 2) -> dict[Outcome, float]:
    """The exact joint law of the first `length` committed tokens, over as many rounds as they take."""
    law: dict[Outcome, float] = defaultdict(float)
    unfinished = {(): 1.0}
    while unfinished:
        output, probability = unfinished.popitem()
        for tokens, weight in round_law(system, output).items():
            longer = (*output, *tokens)
            if len(longer) >= length:
                law[longer[:length]] += probability * weight
            else:
                unfinished[longer] = unfinished.get(longer, 0.0) + probability * weight
    return law
