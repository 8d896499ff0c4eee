"""What a step commits: every request by the same code, whoever shares the step with it.

R requests, K draft slots, B rows with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dspark.drafters.base import Draft
from dspark.engine.laws import Laws
from dspark.engine.request import Request
from dspark.ops.sampling import row_starts
from dspark.ops.verdict import has_kernel
from dspark.speculation.grammar import Guide
from dspark.speculation.noise import RoundNoise
from dspark.speculation.verify import NoNumbers, Verdict, sound, verify, verify_tempered


def judge(
    requests: Sequence[Request],
    laws: Laws,
    draft: Draft | None,
    plan: list[int],
    noise: RoundNoise,
    logits_BV: Tensor,
    guide: Guide | None,
) -> Verdict:
    """The round's verdict; `logits_BV` has 1 + plan rows for each request.

    Requests whose laws temperature and truncation alone shape go through a kernel where there is one, the others
    through tensors. The two differ in the last bits, so a seed gives the same text only because nobody's way depends
    on who else is there.
    Raises NoNumbers with the places of the requests whose laws are no numbers.
    """
    if guide is not None:
        logits_BV = guide.target_logits(logits_BV, plan)
        guide.rewind()
    kernel = has_kernel(logits_BV)
    tempered = [kernel and request.params.tempered for request in requests]
    if all(tempered):
        return _tempered(requests, laws, draft, plan, noise, logits_BV)
    if not any(tempered):
        return _shaped(requests, laws, draft, plan, noise, logits_BV)
    return _apart(requests, laws, draft, plan, noise, logits_BV, tempered)


def _tempered(
    requests: Sequence[Request],
    laws: Laws,
    draft: Draft | None,
    plan: list[int],
    noise: RoundNoise,
    logits_BV: Tensor,
) -> Verdict:
    knobs_R4 = laws.group(requests).shaping.knobs_R4
    assert knobs_R4 is not None
    return verify_tempered(draft, plan, logits_BV, knobs_R4, noise)


def _shaped(
    requests: Sequence[Request],
    laws: Laws,
    draft: Draft | None,
    plan: list[int],
    noise: RoundNoise,
    logits_BV: Tensor,
) -> Verdict:
    return verify(draft, plan, laws.target(requests, logits_BV, draft, plan), noise, sound(logits_BV))


def _apart(
    requests: Sequence[Request],
    laws: Laws,
    draft: Draft | None,
    plan: list[int],
    noise: RoundNoise,
    logits_BV: Tensor,
    tempered: Sequence[bool],
) -> Verdict:
    """Those and these one after the other, put together again."""
    start, failed = row_starts([1 + length for length in plan]), []
    accepted_R, tokens = [0] * len(requests), [[0]] * len(requests)
    for way, kernel in ((_tempered, True), (_shaped, False)):
        places = [place for place, whether in enumerate(tempered) if whether == kernel]
        rows = [start[place] + k for place in places for k in range(1 + plan[place])]
        try:
            found = way(
                [requests[place] for place in places],
                laws,
                draft and _part(draft, places),
                [plan[place] for place in places],
                noise.select(places),
                logits_BV[torch.tensor(rows, device=logits_BV.device)],
            )
        except NoNumbers as error:
            failed += [places[place] for place in error.places]
            continue
        for place, accepted, committed in zip(places, found.accepted_R, found.tokens, strict=True):
            accepted_R[place], tokens[place] = accepted, committed
    if failed:
        raise NoNumbers(sorted(failed))
    return Verdict(accepted_R, tokens, plan)


def _part(draft: Draft, places: Sequence[int]) -> Draft:
    """The draft of some requests, in the order given."""
    index = torch.tensor(places, device=draft.token_RK.device)
    feature_RKF = draft.feature_RKF
    return replace(
        draft,
        token_RK=draft.token_RK[index],
        probability_RKV=draft.probability_RKV[index],
        confidence_RK=draft.confidence_RK[index],
        length_R=[draft.length_R[place] for place in places],
        feature_RKF=feature_RKF if feature_RKF is None else feature_RKF[index],
    )
