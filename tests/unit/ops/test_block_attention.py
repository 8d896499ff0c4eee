"""Blocks see their own document before their anchor and themselves, in every implementation alike."""

import pytest
import torch

from dspark.ops import block_attention as module
from dspark.ops.block_attention import Layout, flex_block_attention, plain_block_attention, tiled_block_attention

B, S, A, K, H, G, D = 2, 40, 7, 3, 4, 2, 16
START_BS = torch.tensor([[0] * 11 + [11] * 17 + [28] * 12, [0] * 40])


def example(dtype=torch.float32, learn=False):
    generator = torch.Generator().manual_seed(0)
    anchor_BA = torch.stack([torch.randperm(S - K, generator=generator)[:A].sort().values for _ in range(B)])
    anchor_BA[0, 0], anchor_BA[0, 3] = 0, 11  # no context at all
    layout = Layout(anchor_BA, START_BS.gather(1, anchor_BA), K, S)
    shapes = [(B, A, K, H, D), (B, A, K, G, D), (B, A, K, G, D), (B, S, G, D), (B, S, G, D)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(learn) for shape in shapes]
    return tensors, layout


@pytest.fixture(params=["tiled", "flex"])
def attend(request, monkeypatch):
    monkeypatch.setattr(module, "TILE", 3)
    return {"tiled": tiled_block_attention, "flex": flex_block_attention}[request.param]


@pytest.mark.parametrize("window", [0, 5])
def test_values_are_the_plain_ones(attend, window):
    tensors, layout = example(torch.float64)
    out, expected = (f(*tensors, layout, 0.3, window=window) for f in (attend, plain_block_attention))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("window", [0, 5])
def test_gradients_are_the_plain_ones(monkeypatch, window):
    monkeypatch.setattr(module, "TILE", 3)
    tensors, layout = example(torch.float64, learn=True)
    out, expected = (f(*tensors, layout, 0.3, window=window) for f in (tiled_block_attention, plain_block_attention))
    seed = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, tensors, seed), torch.autograd.grad(expected, tensors, seed), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_half_precision_under_autocast(attend):
    tensors, layout = example()
    tensors[2] = tensors[2].bfloat16()  # as a projection leaves it, beside normed float32 keys
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*tensors, layout, 0.3)
    expected = plain_block_attention(*(x.float() for x in tensors), layout, 0.3)
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


def test_nothing_outside_the_document_or_at_or_past_the_anchor_is_seen(attend):
    tensors, layout = example()
    before = attend(*tensors, layout, 0.3)
    anchor_BA, start_BA = layout.anchor_BA, layout.start_BA
    for row, block in ((0, 2), (0, 5), (1, 4)):
        hidden = torch.ones(S, dtype=torch.bool)
        hidden[start_BA[row, block] : anchor_BA[row, block]] = False
        others = torch.arange(A) != block
        changed = [x.clone() for x in tensors]
        for own in changed[1:3]:
            own[row, others] = torch.randn_like(own[row, others])
        for context in changed[3:]:
            context[row, hidden] = torch.randn_like(context[row, hidden])
        assert torch.equal(attend(*changed, layout, 0.3)[row, block], before[row, block])


def test_every_seen_key_matters():
    tensors, layout = example(torch.float64, learn=True)
    row, block = 0, 5
    out = tiled_block_attention(*tensors, layout, 0.3)[row, block].pow(2).sum()
    own, context = torch.autograd.grad(out, (tensors[1], tensors[3]))
    start, anchor = layout.start_BA[row, block], layout.anchor_BA[row, block]
    assert context[row].abs().sum((-1, -2)).nonzero()[:, 0].tolist() == list(range(start, anchor))
    assert own[row].abs().sum((-1, -2, -3)).nonzero().tolist() == [[block]]
