"""Log-probabilities of committed tokens, and of prompts', under the target's raw logits, which nothing has shaped.

B rows with logits, N tokens whose request asked, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dspark.engine.admission import Schedule
from dspark.engine.request import Commit, Request, TokenLogprob

Row = tuple[float, list[float], list[int]]
AT_ONCE = 64  # rows in float64: a prompt has many


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
    row_N = torch.tensor(rows, dtype=torch.int64, device=logits_BV.device)
    table = _table(logits_BV[row_N], [token for commit in asked for token in commit.token_ids], most)
    return [_with(commit, request, table) for request, commit in zip(requests, commits, strict=True)]


def score_prompts(schedule: Schedule, logits_NV: Tensor) -> None:
    """Add to each request's `scores` what the step's rows tell of its prompt, in the order of `assemble`."""
    parts = [*zip(schedule.sampled, schedule.rows, strict=True), *schedule.partial]
    places = [(request, request.unscored(rows)) for request, rows in parts]
    tokens = [request.tokens[position + 1] for request, positions in places for position in positions]
    most = max(request.params.prompt_logprobs or 0 for request, _ in parts)
    table = _table(logits_NV, tokens, most)
    for request, positions in places:
        if request.scores is not None:
            following = [request.tokens[position + 1] for position in positions]
            request.scores += _found(following, table, request.params.prompt_logprobs or 0)


def _table(logits_NV: Tensor, tokens: Sequence[int], most: int) -> Iterator[Row]:
    """Of each row the log-probability of its token, and the `most` likeliest with theirs."""
    token_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    for chunk_NV, own_N1 in zip(logits_NV.split(AT_ONCE), token_N1.split(AT_ONCE), strict=True):
        log_NV = torch.log_softmax(chunk_NV.double(), dim=-1)
        value_NM, token_NM = log_NV.topk(min(most, log_NV.shape[1]), dim=-1)
        yield from zip(log_NV.gather(1, own_N1)[:, 0].tolist(), value_NM.tolist(), token_NM.tolist(), strict=True)


def _found(tokens: Sequence[int], table: Iterator[Row], wanted: int) -> list[TokenLogprob]:
    found = []
    for token in tokens:
        own, values, likeliest = next(table)
        found.append(TokenLogprob(token, own, list(zip(likeliest[:wanted], values[:wanted], strict=True))))
    return found


def _with(commit: Commit, request: Request, table: Iterator[Row]) -> Commit:
    wanted = request.params.logprobs
    return commit if wanted is None else replace(commit, logprobs=_found(commit.token_ids, table, wanted))
