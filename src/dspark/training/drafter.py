"""The drafter a recipe asks for, untrained or warm, around its target's embedding and LM head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.drafters.config import DrafterConfig, parse
from dspark.drafters.vocab import TargetParts
from dspark.models.taps import decoder_of
from dspark.training.config import DrafterShape

INIT_STD = 0.02


def even_taps(layers: int, count: int = 5) -> tuple[int, ...]:
    """DeepSpec's spread: from layer 1 to the third from the end. Qwen3-4B's 36 layers give 1, 9, 17, 25, 33."""
    first, last = min(1, layers - 1), max(0, layers - 3)
    return tuple(sorted({round(first + (last - first) * i / max(1, count - 1)) for i in range(count)}))


def drafter_fields(target: PreTrainedConfig, shape: DrafterShape, anchors: int) -> dict[str, Any]:
    """config.json of the drafter, in DeepSpec's format: the target's text config and the drafter's own fields."""
    vocabulary, layers = target.vocab_size, target.num_hidden_layers
    raw = target.to_dict()
    raw |= {
        "architectures": [f"{'Gemma4' if target.model_type.startswith('gemma4') else 'Qwen3'}DSparkModel"],
        "num_hidden_layers": shape.layers,
        "num_target_layers": layers,
        "layer_types": ["full_attention"] * shape.layers,
        "block_size": shape.block_size,
        "mask_token_id": shape.mask_token_id if shape.mask_token_id >= 0 else vocabulary - 1,
        "target_layer_ids": list(shape.taps or even_taps(layers)),
        "num_anchors": anchors,
        "enable_confidence_head": shape.confidence_head,
        "confidence_head_with_markov": shape.confidence_head and shape.markov_rank > 0,
        "markov_rank": shape.markov_rank,
        "markov_head_type": shape.markov_head_type,
        "tie_word_embeddings": False,
        "intermediate_size": shape.intermediate_size or target.intermediate_size,
    }
    raw.pop("_name_or_path", None)
    return raw


def initialise(drafter: nn.Module, generator: torch.Generator) -> None:
    """Normal weights; output projections, W2 and the confidence head start at zero: the first bias is none."""
    for name, parameter in drafter.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in ("o_proj", "down_proj", "markov_w2", "confidence_head")) or name.endswith(
            "bias"
        ):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            std = 1 / parameter.shape[1] ** 0.5 if "fc." in name else INIT_STD
            nn.init.normal_(parameter, std=std, generator=generator)


def stitch(drafter: nn.Module, target: nn.Module, taps: int) -> None:
    """Start from copies of the target's layers, the first and the last among them, and read the mean of the taps.

    Layers of one residual stream speak nearly one language: with `fc` an average of the taps and `hidden_norm` the
    copies' own input norm, context keys and values begin close to what the target itself attends to. Raises
    UserError where the shapes differ.
    """
    backbone: Any = drafter.body.backbone  # type: ignore[union-attr]
    own, theirs = list(backbone.layers), list(decoder_of(target).layers)  # type: ignore[arg-type]
    chosen = [theirs[round(i * (len(theirs) - 1) / max(1, len(own) - 1))] for i in range(len(own))]
    for layer, source in zip(own, chosen, strict=True):
        state = source.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in layer.state_dict().items()}:
            raise UserError("start: target needs a drafter with the target's own layer shape; use start: random")
        layer.load_state_dict(state)
    with torch.no_grad():
        width = backbone.fc.out_features
        backbone.fc.weight.copy_(torch.eye(width).repeat(1, taps) / taps)
        norms = [source.input_layernorm.weight for source in chosen]
        backbone.hidden_norm.weight.copy_(torch.stack(norms).mean(0))


def start_norm(drafter: nn.Module, target: nn.Module) -> None:
    """The last norm starts as the target's: the LM head is the target's, and expects hidden states of that scale."""
    own = dict(drafter.named_parameters())["body.backbone.norm.weight"]
    theirs = getattr(getattr(decoder_of(target), "norm", None), "weight", None)
    if theirs is not None and theirs.shape == own.shape:
        with torch.no_grad():
            own.copy_(theirs)


def create(
    target: nn.Module, shape: DrafterShape, *, anchors: int, seed: int, init: str = "", start: str = "target"
) -> tuple[checkpoint.DrafterModule, DrafterConfig]:
    """A trainable float32 drafter on the target's device, its embedding and head shared with the target and frozen."""
    parts, text = TargetParts.of(target), target.config.get_text_config()  # type: ignore[union-attr,operator]
    fields = drafter_fields(text, shape, anchors)
    fields["vocab_size"] = len(parts.embedding_VD)
    config = parse(fields, "the recipe's drafter")
    device = parts.embedding_VD.device
    if init:
        drafter, loaded = checkpoint.load(init, parts, dtype=torch.float32, device=device)
        if loaded != config:
            raise UserError(
                f"init {init} is a drafter of another shape than the recipe's; make them agree, or drop init"
            )
    else:
        drafter = checkpoint.build(config, parts.embedding_VD, parts.head)
        initialise(drafter, torch.Generator().manual_seed(seed))
        start_norm(drafter, target)
        if start == "target":
            stitch(drafter, target, len(config.taps))
    for name, parameter in drafter.named_parameters():
        parameter.requires_grad_(not checkpoint.is_borrowed(name, config))
    return drafter.train().to(device), config
