"""Compiled FlexAttention over draft blocks gives the plain values and gradients."""

import pytest
import torch

from dspark.ops.block_attention import Layout, flex_block_attention, plain_block_attention

pytestmark = pytest.mark.gpu

B, S, A, K, H, G, D = 2, 300, 40, 7, 4, 2, 32


@pytest.mark.parametrize("window", [0, 64])
def test_values_and_gradients_are_the_plain_ones(window):
    generator = torch.Generator().manual_seed(0)
    anchor_BA = torch.stack([torch.randperm(S - K, generator=generator)[:A].sort().values for _ in range(B)])
    start_BS = torch.where(torch.arange(S) < 130, 0, 130).expand(B, S)
    layout = Layout(anchor_BA.cuda(), start_BS.gather(1, anchor_BA).cuda(), K, S)
    shapes = [(B, A, K, H, D), (B, A, K, G, D), (B, A, K, G, D), (B, S, G, D), (B, S, G, D)]
    tensors = [torch.randn(shape, generator=generator).cuda().requires_grad_() for shape in shapes]
    out, expected = (f(*tensors, layout, 0.2, window=window) for f in (flex_block_attention, plain_block_attention))
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    seed = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, tensors, seed), torch.autograd.grad(expected, tensors, seed), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
