"""The oracle: speculative decoding of one request, written as its definition, that every fast path must equal.

K draft slots, V vocabulary. No batch, no cache, no cleverness; plain callables for the models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dspark.common.rng import ACCEPT, COUPLED, DRAFT, RESIDUAL, exponential_noise, uniform
from dspark.common.sampling_params import SamplingParams
from dspark.ops.history import History
from dspark.ops.sampling import Shaping, shape
from dspark.speculation.grammar import CERTAIN

Law = Callable[[Sequence[int]], Tensor]  # tokens so far -> logits of the next one, [V]
Propose = Callable[[Sequence[int], Sequence[int]], tuple[Tensor, float]]  # committed, drafted -> logits [V], confidence
Plan = Callable[[Sequence[float], int], int]  # confidences of the drafted tokens, limit -> how many to verify
Allowed = Callable[[Sequence[int]], Tensor | None]  # output so far -> tokens that may follow, bool [V]; None at its end

ANY = torch.tensor([True])  # every token, of whatever vocabulary


def generate(
    prompt: Sequence[int],
    target: Law,
    propose: Propose | None,
    plan: Plan,
    params: SamplingParams,
    slots: int,
    seed: int,
    allowed: Allowed = lambda output: ANY,
) -> list[int]:
    """The `params.max_tokens` tokens that any engine of this project writes after `prompt` with this noise.

    Fewer where `allowed`, a grammar, ends the text: the target's law and the drafter's are then of allowed tokens.
    """
    assert params.max_tokens is not None
    output: list[int] = []
    counter = 0
    while len(output) < params.max_tokens and allowed(output) is not None:
        limit = min(slots if propose else 0, params.max_tokens - len(output) - 1)
        drafted: list[int] = []
        laws: list[Tensor] = []
        confidence: list[float] = []
        for k in range(limit):
            assert propose is not None
            may_V = allowed([*output, *drafted])
            if may_V is None:
                break
            logits_V, c = propose([*prompt, *output], drafted)
            q_V = _law(_masked(logits_V, may_V, level=True), prompt, [*output, *drafted], params)
            drafted.append(_sample(q_V, params, seed, (DRAFT, counter, k), len(output) + k))
            laws.append(q_V)
            confidence.append(CERTAIN if len(may_V) > 1 and may_V.sum() == 1 else c)
        committed: list[int] = []
        for k in range(plan(confidence, len(drafted))):
            p_V, x = _target(target, allowed, prompt, [*output, *committed], params), drafted[k]
            if params.coupled:
                choice = _sample(p_V, params, seed, (RESIDUAL, counter, 0), len(output) + k)
                committed.append(choice)
                if choice != x:
                    break
            elif _uniform(seed, (ACCEPT, counter, k)) < min(1.0, float(p_V[x] / laws[k][x])):
                committed.append(x)
            else:
                excess_V = (p_V - laws[k]).clamp(min=0)
                law_V = excess_V / excess_V.sum() if excess_V.sum() > 0 else p_V
                committed.append(_sample(law_V, params, seed, (RESIDUAL, counter, 0), len(output) + k))
                break
        else:
            if allowed([*output, *committed]) is not None:
                p_V = _target(target, allowed, prompt, [*output, *committed], params)
                committed.append(_sample(p_V, params, seed, (RESIDUAL, counter, 0), len(output) + len(committed)))
        output += committed
        counter += 1
    return output


def _target(target: Law, allowed: Allowed, prompt: Sequence[int], output: Sequence[int], p: SamplingParams) -> Tensor:
    may_V = allowed(output)
    assert may_V is not None, "a text goes on past its end"
    return _law(_masked(target([*prompt, *output]), may_V, level=False), prompt, output, p)


def _masked(logits_V: Tensor, may_V: Tensor, *, level: bool) -> Tensor:
    """Forbidden tokens at −inf; `level` makes the allowed ones equal where a drafter gave none of them any weight."""
    own_V = logits_V.masked_fill(~may_V, -torch.inf)
    return own_V.masked_fill(may_V, 0.0) if level and not own_V.isfinite().any() else own_V


def _law(logits_V: Tensor, prompt: Sequence[int], output: Sequence[int], params: SamplingParams) -> Tensor:
    history = History.of([prompt], [output], len(logits_V)) if params.penalized else None
    return shape(logits_V.unsqueeze(0), Shaping.of([params]), history)[0]


def _uniform(seed: int, key: tuple[int, int, int]) -> float:
    stream, counter, slot = key
    return float(uniform(torch.tensor([seed]), torch.tensor([(counter << 12) + slot]), stream))


def _sample(law_V: Tensor, params: SamplingParams, seed: int, key: tuple[int, int, int], position: int) -> int:
    """A token from a law: by inverse CDF under the rejection rule, by the position's own race under the coupled one."""
    if params.coupled:
        noise_V = exponential_noise(torch.tensor([seed]), torch.tensor([position]), len(law_V), COUPLED)[0]
        return int((law_V / noise_V).argmax())
    aim = _uniform(seed, key) * float(law_V.double().sum())
    cumulative = 0.0
    for token, probability in enumerate(law_V.tolist()):
        cumulative += probability
        if probability > 0 and cumulative >= aim:
            return token
    return int(law_V.nonzero()[-1])
