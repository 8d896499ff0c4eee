"""What a step commits: every request by the same code, whoever shares the step with it.

R requests, K draft slots, B rows with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark.drafters.base import Draft
from dspark.engine.laws import Laws
from dspark.engine.request import Request
from dspark.ops.cpu import has_kernel
from dspark.speculation.grammar import Guide
from dspark.speculation.noise import RoundNoise
from dspark.speculation.verify import Verdict, sound, verify, verify_logits


def judge(
    requests: Sequence[Request],
    laws: Laws,
    draft: Draft | None,
    plan: Sequence[int],
    noise: RoundNoise,
    logits_BV: Tensor,
    guide: Guide | None,
) -> Verdict:
    """The round's verdict; `logits_BV` has 1 + plan rows for each request.

    Raises NoNumbers with the places of the requests whose laws are no numbers.
    """
    if guide is not None:
        logits_BV = guide.target_logits(logits_BV, plan)
        guide.rewind()
    if has_kernel(logits_BV):
        adjusted_BV = laws.adjusted(requests, logits_BV, draft, plan)
        return verify_logits(draft, plan, adjusted_BV, laws.group(requests).shaping.knobs_R4, noise)
    return verify(draft, plan, laws.target(requests, logits_BV, draft, plan), noise, sound(logits_BV))
