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

Law = Callable[[Sequence[int]], Tensor]  # tokens so far -> logits of the next one, [V]
Propose = Callable[[Sequence[int], Sequence[int]], tuple[Tensor, float]]  # committed, drafted -> logits [V], confidence
Plan = Callable[[Sequence[float], int], int]  # confidences of the drafted tokens, limit -> how many to verify


def generate(
    prompt: Sequence[int],
    target: Law,
    propose: Propose | None,
    plan: Plan,
    params: SamplingParams,
    slots: int,
    seed: int,
) -> list[int]:
    """The `params.max_tokens` tokens that any engine of this project writes after `prompt` with this noise."""
    assert params.max_tokens is not None
    output: list[int] = []
    counter = 0
    while len(output) < params.max_tokens:
        limit = min(slots if propose else 0, params.max_tokens - len(output) - 1)
        drafted: list[int] = []
        laws: list[Tensor] = []
        confidence: list[float] = []
        for k in range(limit):
            assert propose is not None
            logits_V, c = propose([*prompt, *output], drafted)
            q_V = _law(logits_V, prompt, [*output, *drafted], params)
            drafted.append(_sample(q_V, params, seed, (DRAFT, counter, k), len(output) + k))
            laws.append(q_V)
            confidence.append(c)
        committed: list[int] = []
        for k in range(plan(confidence, limit)):
            p_V, x = _law(target([*prompt, *output, *committed]), prompt, [*output, *committed], params), drafted[k]
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
            p_V = _law(target([*prompt, *output, *committed]), prompt, [*output, *committed], params)
            committed.append(_sample(p_V, params, seed, (RESIDUAL, counter, 0), len(output) + len(committed)))
        output += committed
        counter += 1
    return output


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
