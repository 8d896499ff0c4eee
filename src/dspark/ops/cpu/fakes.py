"""Output shapes of the CPU kernels, so that models that use them can be traced without running them."""

from typing import Any

import torch
from torch import Tensor


@torch.library.register_fake("dspark::linear")
def _linear(x: Tensor, w: Tensor, b: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("dspark::linear2")
def _linear2(x: Tensor, w0: Tensor, b0: Tensor | None, n0: int, *rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty((*x.shape[:-1], n0)), x.new_empty((*x.shape[:-1], rest[2]))


@torch.library.register_fake("dspark::linear3")
def _linear3(x: Tensor, w0: Tensor, b0: Tensor | None, n0: int, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((*x.shape[:-1], n)) for n in (n0, rest[2], rest[5]))


@torch.library.register_fake("dspark::store")
def _store(k: Tensor, v: Tensor, pool_k: Tensor, pool_v: Tensor, slots: Tensor) -> None:
    return None


@torch.library.register_fake("dspark::ragged_attention")
def _ragged_attention(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
