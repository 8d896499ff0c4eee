"""Several processes training one drafter: started by `torchrun`, data parallel, optionally with sharded weights.

A run without `torchrun` is a world of one rank: the same calls, which then do nothing.
B sequences of this rank, S tokens, R ranks that split the target, k taps, D hidden size.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.functional import pad
from transformers import PreTrainedModel

from dspark.common.errors import UserError
from dspark.models.loading import load_causal_lm, load_config, resolve_device, resolve_dtype
from dspark.models.taps import decoder_of
from dspark.training.config import TrainConfig
from dspark.training.data import Batch
from dspark.training.features import OnlineTarget

T = TypeVar("T")
STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
"""What transformers' tp_plan says of a layer's matrices; its other entries are about gradients."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1
    node_size: int = 1  # ranks on one machine

    @staticmethod
    def alone(device: str) -> Ranks:
        """A world of one."""
        return Ranks(resolve_device(device))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Every tensor becomes its sum over ranks, in place."""
        if self.size > 1:
            waiting = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in waiting:
                work.wait()

    def share(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def mesh(self, split: int = 1) -> DeviceMesh:
        """All ranks as a grid: those that are `split` neighbours work on one target."""
        return init_device_mesh(self.device.type, (self.size // split, split), mesh_dim_names=("data", "target"))


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process's place, as `torchrun` says in the environment; a world of one without it."""
    size, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    place = resolve_device(device)
    if size == 1:
        yield Ranks(place)
        return
    if place.type == "cuda":
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(place, dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    finally:
        dist.destroy_process_group()


def check_share(config: TrainConfig, ranks: Ranks) -> None:
    """Raises UserError where the ranks cannot share a step, or the target."""
    if config.batch % (config.micro_batch * ranks.size):
        raise UserError(
            f"batch {config.batch} is no multiple of micro_batch {config.micro_batch} times {ranks.size} ranks; "
            "make it one"
        )
    if ranks.size % config.tensor_parallel:
        raise UserError(f"tensor_parallel {config.tensor_parallel} does not divide {ranks.size} ranks; start more")


def load_target(source: str, dtype: str, ranks: Ranks) -> PreTrainedModel:
    """A frozen target, whose weights are in a machine's memory once: all its ranks map the same file.

    On the CPU a checkpoint in another dtype is converted by one rank of each machine, into a file that goes as soon as
    all have mapped it.
    """
    place = str(ranks.device)
    if ranks.size == 1 or ranks.device.type != "cpu" or stored_as(source, dtype):
        return load_causal_lm(source, dtype=dtype, device=place)
    leader, converted = ranks.rank % ranks.node_size == 0, None
    try:
        problem = None
        if leader:
            converted = tempfile.mkdtemp(prefix="dspark-target-")
            try:
                load_causal_lm(source, dtype=dtype, device=place).save_pretrained(converted)
            except (UserError, OSError) as error:  # the other ranks are told, or they would wait for ever
                problem = str(error)
        told = ranks.share((converted, problem))
        directory, problem = told[ranks.rank - ranks.rank % ranks.node_size]
        if problem is not None or directory is None:
            raise UserError(problem or f"{source} was not converted; see the message of another rank")
        model = load_causal_lm(directory, dtype=dtype, device=place)
        ranks.share(None)  # until all have mapped it
        return model
    finally:
        if converted is not None:
            shutil.rmtree(converted, ignore_errors=True)


def stored_as(source: str, dtype: str) -> bool:
    """Whether a checkpoint's own dtype is the one wanted: then its file is mapped, not copied."""
    config = load_config(source)
    return resolve_dtype("auto", config) == resolve_dtype(dtype, config)


def shard_target(model: PreTrainedModel, ranks: Ranks) -> None:
    """FSDP2 over the target's layers; embedding and LM head, which drafter and loss read, stay whole."""
    mesh = ranks.mesh()["data"]
    for layer in decoder_of(model).layers:
        fully_shard(layer, mesh=mesh)


def split_target(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Tensor parallelism of the target's layers, by transformers' `tp_plan`. Raises UserError where it cannot."""
    decoder = decoder_of(model)
    plan = getattr(decoder.config, "base_model_tp_plan", None) or {}
    ways: dict[str, ParallelStyle] = {}
    for name, style in plan.items():
        if style in STYLES:
            ways[name] = STYLES[style]()
        elif not style.startswith("replicated"):
            raise UserError(f"the target's tp_plan has {name} {style!r}, which is not supported; use shard_target")
    split, config = mesh.size(), decoder.config
    if not ways:
        raise UserError(f"{config.model_type} has no tp_plan; use shard_target")
    if config.num_key_value_heads % split:
        raise UserError(
            f"tensor_parallel {split} does not divide the target's {config.num_key_value_heads} key/value heads"
        )
    parallelize_module(decoder, mesh, ways, src_data_rank=None)


class SplitTarget(OnlineTarget):
    """A target that several ranks split: they bring their rows together, run it on all, and each takes its own."""

    def __init__(self, model: PreTrainedModel, taps: Sequence[int], mesh: DeviceMesh) -> None:
        split_target(model, mesh)
        super().__init__(model, taps)
        self.group, self.place = mesh.get_group(), mesh.get_local_rank()

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As an unsplit target's; every rank of the group calls it as often."""
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, batch.to(torch.device("cpu")), group=self.group)
        begin = sum(len(other.token_BS) for other in found[: self.place])
        rows, width = batch.token_BS.shape
        taps_BSD, last_BSD = super().__call__(beside(found).to(batch.token_BS.device))
        return taps_BSD[begin : begin + rows, :width], last_BSD[begin : begin + rows, :width]


def beside(batches: Sequence[Batch]) -> Batch:
    """Batches as one, padded on the right to the widest; padding is a document of its own."""
    width = max(batch.token_BS.shape[1] for batch in batches)
    tokens, masks, starts = [], [], []
    for batch in batches:
        own = batch.token_BS.shape[1]
        tokens.append(pad(batch.token_BS, (0, width - own)))
        masks.append(pad(batch.mask_BS, (0, width - own)))
        starts.append(pad(batch.start_BS, (0, width - own), value=own))
    pieces = tuple(row for batch in batches for row in batch.pieces)
    return Batch(torch.cat(tokens), torch.cat(masks), torch.cat(starts), pieces)


def shard_drafter(drafter: nn.Module, ranks: Ranks) -> None:
    """FSDP2 over the drafter: every rank keeps a part of weights, gradients and optimizer state.

    One group, gathered for each forward and backward: its layers project context outside their own forward, and the
    loss reads its heads. The frozen tensors it shares with the target stay as they are.
    """
    frozen = {parameter for parameter in drafter.parameters() if not parameter.requires_grad}
    fully_shard(drafter, mesh=ranks.mesh()["data"], ignored_params=frozen)
