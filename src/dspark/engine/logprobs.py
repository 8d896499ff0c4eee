"""Log-probabilities of committed tokens under the target's raw logits, before any sampling parameter shapes them.

B rows with logits, N committed tokens whose request asked, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dspark.engine.request import Commit, Request, TokenLogprob

Row = tuple[float, list[float], list[int]]


def log_probabilities(
    requests: Sequence[Request], commits: list[Commit], plan: Sequence[int], logits_BV: Tensor
) -> list[Commit]:
    """The commits, with log-probabilities where the request asked for them; costs nothing where none did."""
    if all(request.params.logprobs is None for request in requests):
        return commits
    start = 0
    rows: list[int] = []
    for request, commit, length in zip(requests, commits, plan, strict=True):
        if request.params.logprobs is not None:
            rows += range(start, start + len(commit.token_ids))
        start += 1 + length
    asked = [c for r, c in zip(requests, commits, strict=True) if r.params.logprobs is not None]
    most = max(request.params.logprobs or 0 for request in requests)
    log_NV = torch.log_softmax(logits_BV[torch.tensor(rows, device=logits_BV.device)].double(), dim=-1)
    token_N1 = torch.tensor([[t] for c in asked for t in c.token_ids], device=logits_BV.device)
    top_value, top_token = log_NV.topk(min(most, log_NV.shape[1]), dim=-1)
    table = zip(log_NV.gather(1, token_N1)[:, 0].tolist(), top_value.tolist(), top_token.tolist(), strict=True)
    return [_with(commit, request, table) for request, commit in zip(requests, commits, strict=True)]


def _with(commit: Commit, request: Request, table: Iterator[Row]) -> Commit:
    wanted = request.params.logprobs
    if wanted is None:
        return commit
    found = []
    for token in commit.token_ids:
        own, values, tokens = next(table)
        found.append(TokenLogprob(token, own, list(zip(tokens[:wanted], values[:wanted], strict=True))))
    return replace(commit, logprobs=found)
