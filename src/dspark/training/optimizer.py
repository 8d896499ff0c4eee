"""AdamW, or Muon for weight matrices and AdamW for everything else, and one learning-rate factor over both."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dspark.training.config import TrainConfig

# The quintic of Jordan et al. 2024 ("Muon"): steep at 0, so five steps bring all singular values into about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix_NOI: Tensor, *, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: UVᵀ for UΣVᵀ, by Newton-Schulz iteration.

    In bfloat16 on an accelerator; on CPUs float32, whose products take half the time (165 against 85 GFLOP/s a core).
    N matrices of one shape, O outputs, I inputs
    """
    a, b, c = QUINTIC
    wide = matrix_NOI.size(-2) <= matrix_NOI.size(-1)
    x = matrix_NOI if wide else matrix_NOI.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.float32 if x.is_cpu else torch.bfloat16)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix_NOI.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each step moves a matrix equally far in all its directions. (Jordan et al. 2024)"""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        params = list(params)
        for parameter in params:
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices only, got a parameter of shape {tuple(parameter.shape)}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; matrices of one shape go through the iteration together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, same in by_shape.items():
                direction_NOI = torch.stack([whole(self._nesterov(parameter, group["momentum"])) for parameter in same])
                update_NOI = orthogonalise(direction_NOI, steps=group["steps"])
                # A tall matrix of orthonormal columns changes its outputs less than a square one; this evens it out.
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(same, update_NOI.unbind(), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(like(parameter, update.to(parameter.dtype)), alpha=-group["lr"] * scale)
        return loss

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks; any other one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, cut up as the parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The factor of a step: a linear warm-up over that share of the steps, then a cosine to zero."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Optimizers:
    """Muon and AdamW as one: stepped, scheduled and saved together."""

    def __init__(self, muon: Muon | None, adam: torch.optim.AdamW | None) -> None:
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if muon is not None:
            self.parts["muon"] = muon
        if adam is not None:
            self.parts["adam"] = adam
        self._peaks = {name: [group["lr"] for group in part.param_groups] for name, part in self.parts.items()}

    def set_factor(self, factor: float) -> None:
        """Every learning rate becomes `factor` times its peak."""
        for name, part in self.parts.items():
            for group, peak in zip(part.param_groups, self._peaks[name], strict=True):
                group["lr"] = factor * peak

    def step(self) -> None:
        """Apply the gradients and clear them."""
        for part in self.parts.values():
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; the peaks stay those this object was built with."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def build_optimizers(
    model: nn.Module, *, muon_lr: float, adam_lr: float, weight_decay: float = 0.0, exclude: tuple[str, ...] = ()
) -> Optimizers:
    """Muon for the trainable matrices, AdamW for embeddings, vectors and every name that contains a part of `exclude`.

    Embeddings and output heads have one row per token, most of them without gradient in a step: orthogonalising
    them would move the rare rows as far as the frequent ones.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = id(parameter) in tables or "lm_head" in name or any(part in name for part in exclude)
        (matrices if parameter.ndim == 2 and not is_table else others).append(parameter)
    muon = Muon(matrices, muon_lr, weight_decay=weight_decay) if matrices else None
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0) if others else None
    return Optimizers(muon, adam)


def optimizers_of(drafter: nn.Module, config: TrainConfig) -> Optimizers:
    """AdamW for all, or Muon for the backbone's matrices and AdamW for heads, embeddings and vectors."""
    if config.optimizer == "muon":
        heads = ("markov_w2", "confidence_head")
        decay = config.weight_decay
        return build_optimizers(drafter, muon_lr=config.muon_lr, adam_lr=config.lr, weight_decay=decay, exclude=heads)
    parameters = [p for p in drafter.parameters() if p.requires_grad]
    decay = config.weight_decay
    return Optimizers(None, torch.optim.AdamW(parameters, lr=config.lr, weight_decay=decay, fused=True))
