"""Attention for training equals a loop over blocks and positions."""

import pytest
import torch

from dspark.ops.block_attention import Layout, plain_block_attention
from dspark.ops.step_attention import step_attention


def attend(q_Hd, k_SGd, v_SGd, scale):
    group = q_Hd.shape[0] // k_SGd.shape[1]
    k_SHd, v_SHd = k_SGd.repeat_interleave(group, 1), v_SGd.repeat_interleave(group, 1)
    weight_HS = (torch.einsum("hd,shd->hs", q_Hd, k_SHd) * scale).softmax(-1)
    return torch.einsum("hs,shd->hd", weight_HS, v_SHd)


@pytest.mark.parametrize("window", [0, 3])
def test_block_attention(window):
    torch.manual_seed(0)
    B, S, A, K, H, G, d = 2, 11, 3, 4, 4, 2, 8
    q, k, v = (torch.randn(B, A, K, heads, d) for heads in (H, G, G))
    context_k, context_v = torch.randn(B, S, G, d), torch.randn(B, S, G, d)
    anchor_BA = torch.tensor([[0, 4, 10], [1, 1, 7]])
    layout = Layout(anchor_BA, torch.zeros_like(anchor_BA), K, S)
    out = plain_block_attention(q, k, v, context_k, context_v, layout, 0.3, window=window)
    for b in range(B):
        for a in range(A):
            anchor = int(anchor_BA[b, a])
            for slot in range(K):
                first = max(0, anchor + slot - window + 1) if window else 0
                keys = torch.cat([context_k[b, first:anchor], k[b, a]])
                values = torch.cat([context_v[b, first:anchor], v[b, a]])
                expected = attend(q[b, a, slot], keys, values, 0.3)
                torch.testing.assert_close(out[b, a, slot], expected, rtol=1e-5, atol=1e-5)


def test_step_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    out = step_attention(q, k, v, 0.3)
    for query in range(3):
        expected = attend(q[1, query], k[1, : 5 + query], v[1, : 5 + query], 0.3)
        torch.testing.assert_close(out[1, query], expected, rtol=1e-5, atol=1e-5)
