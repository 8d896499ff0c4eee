"""Where committed tokens came from, for requests that ask: a draft that stood, a correction, a bonus, or no draft."""

from __future__ import annotations

from collections.abc import Sequence

from dspark.drafters.base import Draft
from dspark.engine.request import TokenTrace
from dspark.speculation.verify import Verdict


def trace_of(
    tokens: Sequence[int], texts: Sequence[str], *, draft: Draft | None, verdict: Verdict, row: int
) -> list[TokenTrace]:
    """The `tokens` that request `row` of a round took, each with its own text. Reads its draft from the device."""
    planned, accepted = verdict.plan[row], verdict.accepted_R[row]
    drafted = draft.token_RK[row, :planned].tolist() if draft is not None and planned else []
    confidence = draft.confidence_RK[row, :planned].tolist() if draft is not None and planned else []
    traces = []
    for k, (token, text) in enumerate(zip(tokens, texts, strict=True)):
        if k < accepted:
            traces.append(TokenTrace(token, text, "accepted", k + 1, confidence[k]))
        elif k < planned:
            traces.append(TokenTrace(token, text, "corrected", k + 1, confidence[k], rejected=drafted[k]))
        else:
            traces.append(TokenTrace(token, text, "bonus" if planned else "plain"))
    return traces
