"""Whose rounds teach whose: requests that sample alike share what their drafts bring, and those of a group more."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from dspark.common.sampling_params import SamplingParams
from dspark.speculation.calibration import law_of
from dspark.speculation.round import Round

STEPS = 4  # temperatures to one degree that are told apart
HOTTEST = 2.0  # those above are taken for this one


class Kind(NamedTuple):
    """How a request samples, as far as it decides how often drafts are accepted."""

    law: str  # one of LAWS
    temperature: float  # the nearest of a few


class Circle(NamedTuple):
    """A kind and a workload group."""

    kind: Kind
    group: str


def circle_of(params: SamplingParams) -> Circle:
    """The circle that a request belongs to. One that is sampled is never taken for a greedy one, however cold."""
    return _circle(law_of(params), params.temperature, params.speculation_group)


@functools.lru_cache(1 << 12)
def _circle(law: str, temperature: float, group: str) -> Circle:
    nearest = min(max(round(temperature * STEPS), 1) / STEPS, HOTTEST) if temperature else 0.0
    return Circle(Kind(law, nearest), group)


NOBODYS = circle_of(SamplingParams())  # of rounds whose requests' parameters are unknown


def circles_of(round: Round) -> list[Circle]:
    """The circle of each of a round's requests, [R]."""
    return [circle_of(params) for params in round.params_R] or [NOBODYS] * round.requests


def names_of(round: Round) -> Sequence[int]:
    """The id of each of a round's requests, [R]; where none is known, one that no request has."""
    return round.request_ids or range(-round.requests, 0)
