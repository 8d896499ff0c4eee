"""Copies a drafter from one format to another, its weights bit for bit.

V vocabulary, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dspark.common.errors import UserError
from dspark.common.files import replacing_directory
from dspark.drafters import formats
from dspark.drafters.checkpoint import (
    EMBEDDING,
    HEAD,
    borrowed,
    build,
    check_shape,
    flat_name,
    is_borrowed,
    read_drafter,
)
from dspark.drafters.config import DrafterConfig
from dspark.drafters.vocab import TargetParts, check_fit


def export(source: str | Path, out: str | Path, name: str, target: nn.Module | None = None) -> DrafterConfig:
    """Write the drafter in the directory `source`, of any format, to `out` in the format `name`.

    `target` is a causal LM: it is named in the config where the format does that, and lends its embedding and LM head
    where the format holds them and the source does not. Raises UserError for a format that the drafter's kind does not
    have, for a drafter that does not fit the target, for missing or misshapen tensors, and where `out` exists.
    """
    form = formats.named(name)
    if Path(out).exists():
        raise UserError(f"{out} exists; pass a directory that does not")
    config, tensors = read_drafter(source)
    if target is not None:
        parts = TargetParts.of(target)
        check_fit(config, parts, str(source))
        config = replace(config, raw={**config.raw, "target_model_name_or_path": parts.name})
        if form.frozen:
            tensors = lent(config, parts, tensors) | tensors
    check(config, tensors, source, frozen=form.frozen)
    if not form.frozen:
        tensors = {key: tensor for key, tensor in tensors.items() if key not in borrowed(config)}
    written = form.config(config)
    numbers = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    written["dtype"] = str(numbers).removeprefix("torch.")
    with replacing_directory(out) as fresh:
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, fresh / "model.safetensors", metadata={"format": "pt"})
        (fresh / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        (fresh / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return config


def lent(config: DrafterConfig, parts: TargetParts, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The target's embedding and LM head as the file has them, in the drafter's number type."""
    numbers = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    own = {EMBEDDING: parts.embedding_VD, HEAD: cast(nn.Linear, parts.head).weight}
    return {name: own[name].detach().to(device="cpu", dtype=numbers, copy=True) for name in borrowed(config)}


def check(config: DrafterConfig, tensors: Mapping[str, Tensor], source: str | Path, *, frozen: bool) -> None:
    """Raises UserError unless the tensors are exactly those that the config asks for."""
    shape = (config.vocab_size, config.backbone.hidden_size)
    with torch.device("meta"):
        head = nn.Linear(shape[1], shape[0], bias=False)
        drafter = build(config, torch.empty(shape), head)
    wanted = {flat_name(name): like for name, like in drafter.state_dict().items() if not is_borrowed(name, config)}
    for name in borrowed(config):
        if name in tensors:
            check_shape(name, tensors[name], torch.empty(shape, device="meta"), source)
        elif frozen:
            raise UserError(f"{source} has no {name}, which the format holds; pass --target to take it from the target")
    for name, like in wanted.items():
        if name not in tensors:
            raise UserError(f"{source} lacks {name} {list(like.shape)}; the checkpoint is incomplete")
        check_shape(name, tensors[name], like, source)
    surplus = sorted(set(tensors) - set(wanted) - set(borrowed(config)))
    if surplus:
        raise UserError(f"{source} holds {surplus[0]}, which its config.json does not account for; correct the config")
