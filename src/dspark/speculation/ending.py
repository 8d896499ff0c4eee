"""Whether a drafter that pays for every slot shall draft another one: what it would bring against what it takes.

R requests, J slots that could still be drafted.
"""

from __future__ import annotations

import numpy as np

from dspark.speculation.round import Array


def worth_drafting(
    value_R: Array, ahead_J: Array, *, row_seconds: float, draft_seconds_J: Array, tokens_per_second: float
) -> bool:
    """Whether some number of slots more is expected to bring more tokens than their seconds are worth.

    `value_R` is each request's survival through the slot just drawn, times what its tokens are worth; `ahead_J` the
    expected survival of the slots after it over that; `draft_seconds_J` what drafting 1..J more takes. A request whose
    token is not worth its row of the target's forward will not have it verified, and brings nothing.
    """
    gain_RJ = value_R[:, None] * ahead_J - tokens_per_second * row_seconds
    gain_J = np.maximum(gain_RJ, 0.0).sum(0).cumsum()
    return bool((gain_J > tokens_per_second * draft_seconds_J).any())
