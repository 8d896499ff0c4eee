"""The lean backward passes give the plain formulas' values, bit for bit, and their gradients."""

import pytest
import torch
from torch.nn.functional import gelu, silu

from dspark.ops.lean import gated, plain_rms_norm, plain_rotate, rms_norm, rotate


def compared(lean, plain, inputs, bound):
    out, expected = lean(*inputs), plain(*inputs)
    assert torch.equal(out, expected) and out.dtype == expected.dtype
    seed = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)


KINDS = [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)]


@pytest.mark.parametrize(("kind", "bound"), KINDS)
def test_norm(kind, bound):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 16).to(kind).requires_grad_(), torch.randn(16).requires_grad_()
    compared(lambda a, w: rms_norm(a, w, 1e-6), lambda a, w: plain_rms_norm(a, w, 1e-6), (x, weight), bound)
    compared(lambda a: rms_norm(a, None, 1e-6), lambda a: plain_rms_norm(a, None, 1e-6), (x,), bound)


@pytest.mark.parametrize(("kind", "bound"), KINDS)
def test_rotation(kind, bound):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8).to(kind).requires_grad_()
    angle = torch.randn(2, 5, 1, 4).repeat(1, 1, 1, 2)
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)
    compared(lambda a: rotate(a, cos, sin), lambda a: plain_rotate(a, cos, sin), (x,), bound)


@pytest.mark.parametrize("act", [silu, gelu])
@pytest.mark.parametrize(("kind", "bound"), KINDS)
def test_gated(act, kind, bound):
    torch.manual_seed(0)
    gate, up = (torch.randn(4, 6).to(kind).requires_grad_() for _ in range(2))
    compared(lambda a, b: gated(act, a, b), lambda a, b: act(a) * b, (gate, up), bound)
