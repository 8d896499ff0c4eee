"""Fits a step's price to measured steps: robust, never falling with rows, without a term below zero.

N measured steps, F terms of the price.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark.speculation.cost import StepCost, StepTime, hats

Array = NDArray[np.float64]
OUTLIER = 1.5  # a sample this many times the median of its kind was interrupted by something else
PREFILL_WEIGHTS = np.linspace(0.2, 1.6, 29)
PRIOR = 20.0


def fit_cost(steps: Iterable[StepTime]) -> StepCost:
    """The price that fits the steps best in relative terms. Steps of one kind (same rows, requests ...) are repeats."""
    kept = without_outliers(steps)
    decoding = [step for step in kept if not step.prefill]
    knots = sorted({step.rows for step in decoding})
    cost = _target(decoding, knots)
    prefilling = [step for step in kept if step.prefill]
    if prefilling:
        cost["prefill_weight"] = _prefill_weight(StepCost(**cost), prefilling)
    return StepCost(**cost, **_draft(decoding))


def recalibrated(cost: StepCost, steps: Sequence[StepTime], *, outside: float = 0.0) -> StepCost:
    """The cost with its tables scaled, knot by knot, to what steps under load took, and what interrupted them.

    A knot with few steps keeps to the factor of the whole table. A few long interruptions slow the mean and not the
    usual request, so they are kept apart, as `stalls`. `outside` is the share of the time spent between the steps.
    """
    held = [step for step in steps if step.requests and step.seconds > step.draft_seconds]
    if not held:
        return cost
    used, stalls = _uninterrupted(cost, held)
    plain = [step for step in used if not step.prefill] or used
    cost = replace(_scaled(cost, plain), stalls=stalls, outside=outside)
    prefilling = [step for step in used if step.prefill]
    return replace(cost, prefill_weight=_prefill_weight(cost, prefilling)) if prefilling else cost


def _uninterrupted(cost: StepCost, steps: Sequence[StepTime]) -> tuple[list[StepTime], tuple[float, float]]:
    """The steps that took about what steps with or without prefill usually do; stalls a second, and seconds of one."""
    over_N = np.array([step.seconds / sum(cost.of_step(step)) for step in steps])
    prefill_N = np.array([step.prefill > 0 for step in steps])
    usual_N = np.ones(len(steps))
    for same_N in (prefill_N, ~prefill_N):
        if same_N.any():
            usual_N[same_N] = np.median(over_N[same_N])
    calm_N = over_N <= OUTLIER * usual_N
    excess_N = np.array([step.seconds for step in steps]) * (1 - usual_N / over_N) * ~calm_N
    lost = float(excess_N.sum())
    size = float((excess_N**2).sum()) / lost if lost else 0.0  # of the one that a lost second belongs to
    every = sum(step.seconds for step in steps) - lost
    return [step for step, calm in zip(steps, calm_N, strict=True) if calm], (
        lost / size / every if size else 0.0,
        size,
    )


def _scaled(cost: StepCost, used: Sequence[StepTime]) -> StepCost:
    """The cost with its tables scaled to the mean of these steps."""
    price = [cost.of_step(step) for step in used]
    at = np.array([step.rows + cost.prefill_weight * step.prefill for step in used], float)
    took = np.array([step.seconds - step.draft_seconds for step in used])
    draft = np.array([paid for _, paid in price])
    # without a draft, what comes before the forward is part of it
    took += np.where(draft > 0, 0.0, [step.draft_seconds for step in used])
    whole, factor_K = _factors(at, took, np.array([paid for paid, _ in price]), cost.rows)
    changes: dict[str, Any] = {
        "seconds": tuple(never_falling((np.array(cost.seconds) * factor_K).tolist())),
        "per_request": cost.per_request * whole,
        "per_context": cost.per_context * whole,
        "per_attended": cost.per_attended * whole,
    }
    if (draft > 0).any():
        drew = draft > 0
        count = np.array([step.drafting for step in used], float)[drew]
        spent = np.array([step.draft_seconds for step in used])[drew]
        whole, factor_R = _factors(count, spent, draft[drew], cost.draft_requests)
        table = np.maximum.accumulate(np.array(cost.draft_seconds) * factor_R[:, None], 0)
        changes |= {"draft_seconds": tuple(map(tuple, table.tolist()))}
        changes["draft_per_context"] = cost.draft_per_context * whole
    return replace(cost, **changes)


def _factors(at_N: Array, took_N: Array, price_N: Array, knots: Sequence[int]) -> tuple[float, Array]:
    """Seconds over price, of all steps and around each knot; `PRIOR` steps say that a knot is like all of them."""
    weight_NK = hats(np.minimum(at_N, knots[-1]), knots) / price_N[:, None]  # every step counts alike, long or short
    whole = float((took_N / price_N).mean())
    return whole, (weight_NK.T @ took_N + PRIOR * whole) / (weight_NK.T @ price_N + PRIOR)


def without_outliers(steps: Iterable[StepTime]) -> list[StepTime]:
    """The steps less those far above the median of their kind."""
    kinds: dict[tuple[int, ...], list[StepTime]] = {}
    for step in steps:
        kinds.setdefault((step.rows, step.requests, step.prefill, step.drafting, step.slots), []).append(step)
    kept = []
    for group in kinds.values():
        usual = median(step.seconds for step in group)
        kept += [step for step in group if step.seconds <= OUTLIER * usual]
    return kept


def never_falling(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The nearest sequence that never falls: neighbours out of order share their mean."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights if weights is not None else [1.0] * len(values), strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (one, a, n), (two, b, m) = blocks[-2:]
            blocks[-2:] = [((one * a + two * b) / (a + b), a + b, n + m)]
    return [mean for mean, _, length in blocks for _ in range(length)]


def _target(steps: list[StepTime], knots: list[int]) -> dict[str, Any]:
    """Table and linear terms from steps without prefill; a table alone where nothing else varies."""
    rows = np.array([step.rows for step in steps], float)
    context = np.array([step.context for step in steps], float)
    requests = np.array([step.requests for step in steps], float)
    seconds = np.array([step.seconds - step.draft_seconds for step in steps])
    terms = [requests, context, rows * context / np.maximum(requests, 1)]
    design_NF = np.column_stack([hats(rows, knots), *terms])
    found_F = _robust(design_NF, seconds, free=len(knots))
    count_K = hats(rows, knots).sum(0)
    table = never_falling(np.maximum(found_F[: len(knots)], 1e-9).tolist(), count_K.tolist())
    per_request, per_context, per_attended = found_F[len(knots) :].tolist()
    return {
        "rows": tuple(knots),
        "seconds": tuple(table),
        "per_request": per_request,
        "per_context": per_context,
        "per_attended": per_attended,
    }


def _robust(design_NF: Array, seconds_N: Array, *, free: int) -> Array:
    """Least relative error with Huber's weights; terms from `free` on that come out below 0 are left out.

    So is every request's term where it leaves nothing for a row: noise, not requests, was then measured.
    """
    used = np.ones(design_NF.shape[1], bool)
    trust_N = 1.0 / seconds_N
    found_F = np.zeros(design_NF.shape[1])
    for _ in range(12):
        scale_F = np.maximum(np.abs(design_NF[:, used]).max(0), 1e-12)
        ridge = np.diag(np.where(np.flatnonzero(used) < free, 1e-4, 1e-2))  # a term must earn its place
        matrix = np.vstack([design_NF[:, used] * trust_N[:, None] * seconds_N.mean() / scale_F, ridge])
        right = np.concatenate([seconds_N * trust_N * seconds_N.mean(), np.zeros(len(ridge))])
        found_F[:] = 0
        found_F[used] = np.linalg.lstsq(matrix, right, rcond=None)[0] / scale_F
        negative = np.flatnonzero((found_F < 0) & (np.arange(len(found_F)) >= free))
        if not len(negative) and used[free] and found_F[:free].min() <= 0:
            negative = np.array([free])
        if len(negative):
            used[negative] = False
            continue
        error_N = np.abs(design_NF @ found_F / seconds_N - 1)
        bound = 1.5 * max(float(np.median(error_N)), 1e-3)
        trust_N = np.minimum(1.0, bound / np.maximum(error_N, 1e-12)) ** 0.5 / seconds_N
    return found_F


def _prefill_weight(cost: StepCost, steps: list[StepTime]) -> float:
    """What a row without logits costs, as a share of one with: the weight with the least median relative error."""
    seconds = np.array([step.seconds - step.draft_seconds for step in steps])
    errors = []
    for weight in PREFILL_WEIGHTS:
        tried = StepCost(**(cost.as_dict() | {"prefill_weight": float(weight)}))
        price = [
            float(tried.target(s.rows, requests=max(s.requests, 1), context=s.context, prefill=s.prefill))
            for s in steps
        ]
        errors.append(float(np.median(np.abs(np.array(price) / seconds - 1))))
    return float(PREFILL_WEIGHTS[int(np.argmin(errors))])


def _draft(steps: list[StepTime]) -> dict[str, Any]:
    """The draft's table by requests and slots, and its context's share; nothing for an engine that never drafted."""
    drafts: dict[tuple[int, int], list[StepTime]] = {}
    for step in steps:
        if step.drafting and step.slots:
            drafts.setdefault((step.drafting, step.slots), []).append(step)
    requests = sorted({r for r, _ in drafts})
    slots = sorted({k for r, k in drafts if all((other, k) in drafts for other in requests)})
    if not slots:
        return {}
    per_context = _context_share(drafts.values())
    base = {
        kind: median(max(step.draft_seconds - per_context * step.context, 1e-9) for step in group)
        for kind, group in drafts.items()
    }
    table = [never_falling([base[r, k] for k in slots]) for r in requests]
    columns = [never_falling(column) for column in zip(*table, strict=True)]
    rows = [tuple(np.maximum.accumulate(row).tolist()) for row in zip(*columns, strict=True)]
    return {
        "draft_requests": tuple(requests),
        "draft_slots": tuple(slots),
        "draft_seconds": tuple(rows),
        "draft_per_context": per_context,
    }


def _context_share(groups: Iterable[list[StepTime]]) -> float:
    """Seconds a context token adds to a draft, from the kinds of drafts measured with short and with long contexts."""
    slopes = []
    for group in groups:
        half = (min(step.context for step in group) + max(step.context for step in group)) / 2
        short, long = [s for s in group if s.context <= half], [s for s in group if s.context > half]
        if long and min(s.context for s in long) > 2 * max(s.context for s in short):
            more = median(s.draft_seconds for s in long) - median(s.draft_seconds for s in short)
            slopes.append(more / (median(s.context for s in long) - median(s.context for s in short)))
    return max(median(slopes), 0.0) if slopes else 0.0
