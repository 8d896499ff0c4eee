"""Attention of stepwise drafters in training equals attention over each place's own keys, one place at a time."""

import pytest
import torch

from dspark.ops.tail_attention import document_attention, tail_attention

B, S, A, C, H, G, D = 2, 11, 4, 3, 4, 2, 6
START_BS = torch.tensor([[0] * 5 + [5] * 6, [0] * 9 + [9] * 2])
LAST_BA = torch.tensor([[2, 4, 5, 10], [0, 3, 8, 10]])


def one(q_Hd, k_NGd, v_NGd, window):
    """A single query over its keys, its own last."""
    first = max(0, len(k_NGd) - window) if window else 0
    k, v = (x[first:].repeat_interleave(H // G, dim=1) for x in (k_NGd, v_NGd))
    weight_HN = torch.einsum("hd,nhd->hn", q_Hd, k).mul(0.4).softmax(-1)
    return torch.einsum("hn,nhd->hd", weight_HN, v)


@pytest.mark.parametrize("window", [0, 4, 2])
@pytest.mark.parametrize("tail", [0, C])
@pytest.mark.parametrize("most_scores", [1, 200, 1 << 27])
def test_a_place_sees_its_document_and_its_tail(window, tail, most_scores):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, A, H, D), torch.randn(B, S, G, D), torch.randn(B, S, G, D)
    tail_k, tail_v = torch.randn(B, A, tail, G, D), torch.randn(B, A, tail, G, D)
    inputs = [x.requires_grad_() for x in (q, k, v, tail_k, tail_v)]
    start_BA = START_BS.gather(1, LAST_BA)
    found = tail_attention(*inputs, LAST_BA, start_BA, 0.4, window=window, most_scores=most_scores)
    wanted = torch.empty_like(found)
    for b in range(B):
        for a in range(A):
            seen = slice(int(start_BA[b, a]), int(LAST_BA[b, a]) + 1)
            keys, values = torch.cat((k[b, seen], tail_k[b, a])), torch.cat((v[b, seen], tail_v[b, a]))
            # without a tail the query is the last context key's own; with one, the tail's last
            wanted[b, a] = one(q[b, a], keys, values, window)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    for got, want in zip(
        torch.autograd.grad((found * weight).sum(), inputs, allow_unused=True),
        torch.autograd.grad((wanted * weight).sum(), inputs, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [0, 3])
def test_tokens_see_their_document(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, S, H, D), torch.randn(B, S, G, D), torch.randn(B, S, G, D)
    found = document_attention(q, k, v, START_BS, 0.4, window=window)
    for b in range(B):
        for s in range(S):
            seen = slice(int(START_BS[b, s]), s + 1)
            torch.testing.assert_close(found[b, s], one(q[b, s], k[b, seen], v[b, seen], window))
