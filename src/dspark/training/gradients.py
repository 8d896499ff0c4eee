"""Gradients of a step's loss, summed over its micro-batches and ranks.

Every micro-batch gives the gradient of weight·loss, so that one division by the step's whole weight makes the mean
over all supervised slots of the global batch, however it was cut into micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dspark.training.objectives import Objective
from dspark.training.sharding import Ranks

Goal = Callable[[Any], Objective]
T = TypeVar("T")


class Gradients(Protocol):
    """Leaves Σ weight·gradient over all ranks in `.grad`; returns this rank's objectives, in order."""

    def __call__(self, goal: Goal, jobs: Sequence[Any]) -> list[Objective]: ...

    def values(self, work: Callable[[Any], T], jobs: Sequence[Any]) -> list[T]:
        """What `work` makes of every job, without gradients."""
        ...


class Replicated:
    """Every rank has the whole drafter; on the CPU one micro-batch runs per thread.

    No barrier inside an operation, so that a busy neighbour delays one micro-batch and not every matrix product.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks, threads: int) -> None:
        self.parameters, self.ranks = parameters, ranks
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, goal: Goal, jobs: Sequence[Any]) -> list[Objective]:
        def part(job: Any) -> tuple[Objective, tuple[Tensor | None, ...]]:
            found = goal(job)
            total = found.total * found.weight
            return found, torch.autograd.grad(total, self.parameters, allow_unused=True)

        goals = []
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for found, gradients in self.pool.map(part, jobs):
            goals.append(found)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad.add_(gradient)  # type: ignore[union-attr]
        self.ranks.sum_(parameter.grad for parameter in self.parameters)  # type: ignore[misc]
        return goals

    def values(self, work: Callable[[Any], T], jobs: Sequence[Any]) -> list[T]:
        def part(job: Any) -> T:
            with torch.no_grad():  # a thread has its own
                return work(job)

        return list(self.pool.map(part, jobs))


class Sharded:
    """FSDP2 gathers weights and scatters gradients by hooks, so micro-batches run one after another."""

    def __init__(self, drafter: nn.Module, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self.drafter, self.parameters, self.ranks = drafter, parameters, ranks

    def __call__(self, goal: Goal, jobs: Sequence[Any]) -> list[Objective]:
        goals = []
        for job in jobs:
            found = goal(job)
            (found.total * found.weight).backward()
            goals.append(found)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.mul_(self.ranks.size)  # FSDP2 averages over ranks
        return goals

    def values(self, work: Callable[[Any], T], jobs: Sequence[Any]) -> list[T]:
        with torch.no_grad():
            found = [work(job) for job in jobs]
        self.drafter.reshard()  # type: ignore[operator]  # a backward does it, and there was none
        return found
