"""How the weights of an untrained drafter begin: random, or as the target's own.

V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from dspark.common.errors import UserError
from dspark.drafters.config import DrafterConfig
from dspark.drafters.eagle3 import Eagle3
from dspark.drafters.medusa import Medusa
from dspark.drafters.mtp import MTP, MTPLayer
from dspark.models.taps import decoder_of

INIT_STD = 0.02
# With this and projections that read both halves, Eagle-3's held-out KL on the demo target is 3.4 after 50 small steps;
# with features at full size and projections that began by reading those alone it was 4.0.
QUIET = 0.25
ZEROS = ("o_proj", "down_proj", "markov_w2", "confidence_head", "medusa_head")


def initialise(drafter: nn.Module, generator: torch.Generator) -> None:
    """Normal weights; output projections, W2, the confidence and Medusa heads start at zero: they first add nothing."""
    for name, parameter in drafter.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in ZEROS) or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            std = 1 / parameter.shape[1] ** 0.5 if "fc." in name else INIT_STD
            nn.init.normal_(parameter, std=std, generator=generator)


@torch.no_grad()
def start(drafter: nn.Module, config: DrafterConfig, target: nn.Module, *, from_target: bool) -> None:
    """Last norms and own LM heads begin as the target's; `from_target` copies layers too where a kind has any."""
    start_norms(drafter, target)
    head_VD = cast(Any, target).get_output_embeddings().weight
    if isinstance(drafter, Medusa) and drafter.lm_head is None:
        for head in drafter.medusa_head:
            cast(Any, head)[-1].weight.copy_(head_VD)
    if not from_target:
        return
    if isinstance(drafter, Eagle3):
        stitch_eagle3(drafter, target, len(config.taps))
    elif isinstance(drafter, MTP):
        stitch_mtp(drafter, target)
    elif config.kind in ("dspark", "dflash"):
        stitch(drafter, target, len(config.taps))


def start_norms(drafter: nn.Module, target: nn.Module) -> None:
    """Norms before an LM head that is the target's expect to give what the target's own last norm gives."""
    norm = getattr(decoder_of(target), "norm", None)  # type: ignore[arg-type]
    for name, own in drafter.named_parameters():
        last = name in ("norm.weight", "body.backbone.norm.weight") or name.endswith("shared_head.norm.weight")
        if last and norm is not None and own.shape == norm.weight.shape:
            own.copy_(norm.weight)


def copy_layer(source: nn.Module, layer: nn.Module, ignored: tuple[str, ...] = ()) -> None:
    """All of a target layer's weights into a drafter's. Raises UserError where the shapes differ."""
    theirs, own = source.state_dict(), layer.state_dict()
    shapes = {name: tensor.shape for name, tensor in own.items() if not name.startswith(ignored)}
    if {name: tensor.shape for name, tensor in theirs.items()} != shapes:
        raise UserError("start: target needs a drafter with the target's own layer shape; use start: random")
    layer.load_state_dict(theirs, strict=False)


def stitch(drafter: nn.Module, target: nn.Module, taps: int) -> None:
    """Start from copies of the target's layers, the first and the last among them, and read the mean of the taps.

    Layers of one residual stream speak nearly one language: with `fc` an average of the taps and `hidden_norm` the
    copies' own input norm, context keys and values begin close to what the target itself attends to.
    """
    backbone: Any = drafter.body.backbone  # type: ignore[union-attr]
    chosen = spread(list(decoder_of(target).layers), len(backbone.layers))  # type: ignore[arg-type]
    for layer, source in zip(backbone.layers, chosen, strict=True):
        copy_layer(source, layer)
    mean_of_taps(backbone.fc, taps)
    backbone.hidden_norm.weight.copy_(torch.stack([source.input_layernorm.weight for source in chosen]).mean(0))


def stitch_eagle3(drafter: Eagle3, target: nn.Module, taps: int) -> None:
    """The last target layer, whose projections read the mean of embedding and features through its own input norm.

    The features are the mean of the taps, and small: they are the residual, which alone says the token that is known
    already, while norms before every product hide their size from the layer.
    """
    source = last_layer(target)
    own, theirs = drafter.layer.state_dict(), source.state_dict()
    theirs["hidden_norm.weight"] = theirs["input_layernorm.weight"]
    if set(own) != set(theirs):
        raise UserError("start: target needs a drafter with the target's own layer shape; use start: random")
    for name, tensor in theirs.items():
        wide = own[name]
        if wide.shape == tensor.shape:
            wide.copy_(tensor)
        elif wide.dim() == 2 and wide.shape == (tensor.shape[0], 2 * tensor.shape[1]):
            wide.copy_(torch.cat((tensor, tensor), dim=1) / 2)
        else:
            raise UserError("start: target needs a drafter with the target's own layer shape; use start: random")
    mean_of_taps(drafter.fc, taps)
    drafter.fc.weight.mul_(QUIET)


def stitch_mtp(drafter: MTP, target: nn.Module) -> None:
    """Every module the last target layer, on the mean of the normed embedding and hidden state."""
    source = last_layer(target)
    for layer in drafter.layers:
        module = cast(MTPLayer, layer)
        copy_layer(source, module, ignored=("enorm", "hnorm", "eh_proj", "shared_head"))
        mean_of_taps(module.eh_proj, 2)


def mean_of_taps(linear: nn.Linear, count: int) -> None:
    """A projection of `count` vectors side by side that averages them."""
    eye_DD = torch.eye(linear.out_features, device=linear.weight.device)
    linear.weight.copy_(eye_DD.repeat(1, count) / count)


def spread(layers: list[Any], count: int) -> list[Any]:
    """`count` of the layers, the first and, of several, the last among them."""
    return [layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)]


def last_layer(target: nn.Module) -> nn.Module:
    return list(decoder_of(target).layers)[-1]  # type: ignore[arg-type]
