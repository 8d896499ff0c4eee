"""From logits to the law a token is drawn from, and from a law to a token: the same code for target and drafter.

B rows, V vocabulary. Every step works row by row, so a row's law does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from dspark.common.sampling_params import SamplingParams
from dspark.ops.history import History
from dspark.ops.rows import argmax
from dspark.ops.truncation import truncate

Bias = tuple[Tensor, Tensor, Tensor]  # rows, tokens (int64) and values (float64) of the biased logits
REMEMBERED = 32  # numbers of rows whose repeated shaping is kept
_NO_TOP_K, _NO_TOP_P = float(1 << 40), 0.0  # above any vocabulary; less than any mass


@dataclass(frozen=True)
class Shaping:
    """Sampling parameters of B rows as tensors, with host-side flags that say which steps any row needs."""

    params: tuple[SamplingParams, ...]  # of each row
    knobs_PB1: Tensor  # float64: temperature, greedy, top_k, top_p, min_p, repetition, presence, frequency
    bias: Bias | None
    greedy: bool  # every row is at temperature 0
    mixed: bool  # some rows are and some are not
    tempered: bool
    top_k: bool
    top_p: bool
    min_p: bool
    penalized: bool
    _repeated: dict[tuple[int, ...], Shaping] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> Shaping:
        """One row per element of `params`."""
        live = [p for p in params if p.temperature]  # truncation changes nothing at temperature 0
        knobs_BP = [
            (
                p.temperature or 1.0,
                float(p.temperature == 0),
                p.top_k if p.top_k and p.temperature else _NO_TOP_K,
                p.top_p if p.top_p < 1 and p.temperature else _NO_TOP_P,
                p.min_p if p.temperature else 0.0,
                p.repetition_penalty,
                p.presence_penalty,
                p.frequency_penalty,
            )
            for p in params
        ]
        return cls(
            params=tuple(params),
            knobs_PB1=torch.tensor(knobs_BP, dtype=torch.float64).T.unsqueeze(2).contiguous().to(device),
            bias=_bias(params, device),
            greedy=not live,
            mixed=0 < len(live) < len(params),
            tempered=any(p.temperature != 1 for p in live),
            top_k=any(p.top_k for p in live),
            top_p=any(p.top_p < 1 for p in live),
            min_p=any(p.min_p for p in live),
            penalized=any(p.penalized for p in params),
        )

    @cached_property
    def knobs_R4(self) -> Tensor:
        """Float64 temperature, top_k, top_p and min_p of each row, as the round kernels read them.

        A temperature of 0 stands for the largest logit; a top_k above the vocabulary, a top_p and min_p of 0 for all.
        """
        knobs_PB = self.knobs_PB1[:, :, 0]
        return torch.stack([knobs_PB[0] * (1 - knobs_PB[1]), *knobs_PB[2:5]], 1).contiguous()

    @property
    def adjusts(self) -> bool:
        """Whether any row's logits change before the temperature: `adjust`."""
        return self.penalized or self.bias is not None

    @property
    def truncated(self) -> bool:
        """Whether any row cuts its law's tail."""
        return self.top_k or self.top_p or self.min_p

    def repeat(self, rows: Sequence[int]) -> Shaping:
        """The shaping of a batch in which row b comes rows[b] times in a row (one request's 1 + ℓ positions)."""
        key = tuple(rows)
        if key not in self._repeated:
            if len(self._repeated) >= REMEMBERED:
                self._repeated.clear()
            self._repeated[key] = self._repeat(key)
        return self._repeated[key]

    def _repeat(self, rows: Sequence[int]) -> Shaping:
        params = tuple(p for p, n in zip(self.params, rows, strict=True) for _ in range(n))
        if not (self.tempered or self.mixed or self.top_k or self.top_p or self.min_p or self.penalized or self.bias):
            return replace(self, params=params, _repeated={})  # no step reads the knobs
        index_B = torch.tensor([b for b, n in enumerate(rows) for _ in range(n)])
        knobs_PB1 = self.knobs_PB1.index_select(1, index_B.to(self.knobs_PB1.device))
        return replace(self, params=params, knobs_PB1=knobs_PB1, bias=_bias(params, knobs_PB1.device), _repeated={})


def _bias(params: Sequence[SamplingParams], device: torch.device | str) -> Bias | None:
    entries = [(row, token, value) for row, p in enumerate(params) for token, value in (p.logit_bias or {}).items()]
    if not entries:
        return None
    rows, tokens, values = zip(*entries, strict=True)
    as_float = torch.tensor(values, dtype=torch.float64, device=device)
    return torch.tensor(rows, device=device), torch.tensor(tokens, device=device), as_float


def shape(logits_BV: Tensor, shaping: Shaping, history: History | None = None) -> Tensor:
    """The law of the next token, float32 [B, V] (float64 for float64 logits): what `draw` draws from.

    In order: repetition, presence and frequency penalties, logit bias, temperature, top-k, top-p, min-p, as in
    Hugging Face and vLLM. Temperature 0 is all mass on the largest logit, the lowest token on ties. Tokens as likely
    as the last one that top-k or top-p keeps are kept as well, so that no order among equals matters.
    `history` has the tokens before each row, those drafted in the same block included; only penalties need it.
    """
    x_BV = adjust(logits_BV, shaping, history)
    if shaping.greedy:
        return _one_hot(x_BV)
    tempered_BV = x_BV / shaping.knobs_PB1[0].to(x_BV.dtype) if shaping.tempered else x_BV
    probability_BV = tempered_BV.softmax(-1)
    if shaping.truncated:
        live = [p for p in shaping.params if p.temperature]
        cuts_PB1 = shaping.knobs_PB1[2:5]
        probability_BV = truncate(
            probability_BV, cuts_PB1, top_k=max(p.top_k for p in live), top_p=shaping.top_p, min_p=shaping.min_p
        )
    if shaping.mixed:
        probability_BV = torch.where(shaping.knobs_PB1[1] > 0, _one_hot(x_BV), probability_BV)
    return probability_BV


def adjust(logits_BV: Tensor, shaping: Shaping, history: History | None = None) -> Tensor:
    """The logits after penalties and bias, float32 [B, V], or float64: the part of `shape` before the temperature."""
    x_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    if shaping.penalized:
        assert history is not None, "penalties need the token counts of each row"
        x_BV = _penalize(x_BV, shaping, history)
    if shaping.bias is not None:
        rows, tokens, values = shaping.bias
        x_BV = x_BV.index_put((rows, tokens), values.to(x_BV.dtype), accumulate=True)
    return x_BV


def _one_hot(x_BV: Tensor) -> Tensor:
    return torch.zeros_like(x_BV).scatter_(1, argmax(x_BV).unsqueeze(1), 1.0)


def _penalize(x_BV: Tensor, shaping: Shaping, history: History) -> Tensor:
    repetition_B1, presence_B1, frequency_B1 = shaping.knobs_PB1[5:].to(x_BV.dtype)
    if any(p.repetition_penalty != 1 for p in shaping.params):
        repeated_BV = torch.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1)
        x_BV = torch.where((history.output_BV > 0) | history.prompt_BV, repeated_BV, x_BV)
    if any(p.frequency_penalty for p in shaping.params):
        x_BV = x_BV - history.output_BV * frequency_B1
    if any(p.presence_penalty for p in shaping.params):
        x_BV = x_BV - (history.output_BV > 0) * presence_B1
    return x_BV


def draw(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token whose cumulative probability reaches u times the row's total: int64 [B], u in (0, 1].

    A token of probability zero is never drawn, whatever the rounding. A row that is not finite or has no mass
    gives no token: V for NaN, to be caught by whoever reads the result.
    """
    cumulative_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    aim_B1 = (cumulative_BV[:, -1] * uniform_B).unsqueeze(1)
    return torch.searchsorted(cumulative_BV, aim_B1).squeeze(1)


def race(probability_BV: Tensor, exponential_BV: Tensor) -> Tensor:
    """argmax(log p + g) for the Gumbel noise g = -log e, as the winner of p / e: int64 [B], distributed as p."""
    return argmax(probability_BV / exponential_BV)


def row_starts(rows: Sequence[int]) -> list[int]:
    """Where each request's rows begin in a request-major batch with rows[r] rows for request r."""
    starts = [0]
    for n in rows:
        starts.append(starts[-1] + n)
    assert all(a <= b for a, b in pairwise(starts))
    return starts[:-1]
