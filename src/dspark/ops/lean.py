"""The elementwise parts of a decoder layer, with backward passes that keep their inputs and nothing else.

Each is its plain formula where no gradient is wanted, and bit for bit that formula's value where one is.
... leading dimensions, D width, h heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def plain_rms_norm(x_D: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """x / √(mean x² + ε), reduced in float32 and rounded where the Hugging Face models round, then times the weight."""
    wide_D = x_D.float()
    normed_D = (wide_D * torch.rsqrt(wide_D.pow(2).mean(-1, keepdim=True) + eps)).to(x_D.dtype)
    return normed_D if weight_D is None else weight_D * normed_D


class RMSNormFunction(torch.autograd.Function):
    """With r = 1/√(mean x² + ε) and g the gradient by x̂ = r·x: dx = r·(g − x̂·mean(g·x̂))."""

    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x_D, weight_D)
        ctx.eps = eps
        return plain_rms_norm(x_D, weight_D, eps)

    @staticmethod
    def backward(ctx: Any, gradient_D: Tensor) -> tuple[Tensor | None, ...]:
        x_D, weight_D = ctx.saved_tensors
        wide_D, gradient_D = x_D.float(), gradient_D.float()
        scale_1 = torch.rsqrt(torch.linalg.vecdot(wide_D, wide_D)[..., None] / wide_D.shape[-1] + ctx.eps)
        weight_gradient_D = None
        if weight_D is not None:
            if ctx.needs_input_grad[1]:
                product_D = gradient_D * wide_D * scale_1
                weight_gradient_D = product_D.flatten(0, -2).sum(0).to(weight_D.dtype)
            gradient_D = gradient_D * weight_D
        inner_1 = torch.linalg.vecdot(gradient_D, wide_D)[..., None] * scale_1.pow(3) / wide_D.shape[-1]
        return (gradient_D * scale_1).addcmul_(wide_D, inner_1, value=-1).to(x_D.dtype), weight_gradient_D, None


def rms_norm(x_D: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm, with or without weights."""
    if learns(x_D) or learns(weight_D):
        return RMSNormFunction.apply(x_D, weight_D, eps)
    return plain_rms_norm(x_D, weight_D, eps)


def plain_rotate(x_hd: Tensor, cos_1d: Tensor, sin_1d: Tensor) -> Tensor:
    """Turn heads by the angles of their positions."""
    first, second = x_hd.chunk(2, dim=-1)
    return x_hd * cos_1d + torch.cat((-second, first), dim=-1) * sin_1d


class RotateFunction(torch.autograd.Function):
    """A rotation's gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x_hd: Tensor, cos_1d: Tensor, sin_1d: Tensor) -> Tensor:
        ctx.save_for_backward(cos_1d, sin_1d)
        return plain_rotate(x_hd, cos_1d, sin_1d)

    @staticmethod
    def backward(ctx: Any, gradient_hd: Tensor) -> tuple[Tensor | None, ...]:
        cos_1d, sin_1d = ctx.saved_tensors
        return plain_rotate(gradient_hd, cos_1d, -sin_1d), None, None


def rotate(x_hd: Tensor, cos_1d: Tensor, sin_1d: Tensor) -> Tensor:
    """Rotary embedding; cosines and sines repeat in both halves and carry no gradient."""
    if learns(x_hd):
        return RotateFunction.apply(x_hd, cos_1d, sin_1d)
    return plain_rotate(x_hd, cos_1d, sin_1d)


class GatedFunction(torch.autograd.Function):
    """The activation is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            open_ = ctx.act(leaf)
        (gate_gradient,) = torch.autograd.grad(open_, leaf, gradient * up)
        return None, gate_gradient, gradient * open_.detach()


def gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """act(gate)·up, the middle of SwiGLU and GeGLU."""
    if learns(gate) or learns(up):
        return GatedFunction.apply(act, gate, up)
    return act(gate) * up


def learns(x: Tensor | None) -> bool:
    """Whether a gradient will be asked for."""
    return x is not None and x.requires_grad and torch.is_grad_enabled()
