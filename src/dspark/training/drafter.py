"""The drafter a recipe asks for, untrained or warm, around its target's embedding and LM head.

V vocabulary, U draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.drafters.config import DrafterConfig, architecture, parse
from dspark.drafters.eagle3 import Eagle3
from dspark.drafters.pruned import most_frequent
from dspark.drafters.vocab import TargetParts
from dspark.training.data import read
from dspark.training.shape import DrafterShape
from dspark.training.start import initialise
from dspark.training.start import start as start_weights
from dspark.training.student import create_student


def even_taps(layers: int, count: int = 5) -> tuple[int, ...]:
    """DeepSpec's spread: from layer 1 to the third from the end. Qwen3-4B's 36 layers give 1, 9, 17, 25, 33."""
    first, last = min(1, layers - 1), max(0, layers - 3)
    return tuple(sorted({round(first + (last - first) * i / max(1, count - 1)) for i in range(count)}))


def drafter_fields(target: PreTrainedConfig, shape: DrafterShape, anchors: int) -> dict[str, Any]:
    """config.json of the drafter, in DeepSpec's format: the target's text config and the drafter's own fields."""
    own = {"eagle3": eagle3_fields, "mtp": mtp_fields, "medusa": medusa_fields, "layer_skip": layer_skip_fields}
    raw = target.to_dict() | {
        "num_target_layers": target.num_hidden_layers,
        "num_anchors": anchors,
        "tie_word_embeddings": False,
        "intermediate_size": shape.intermediate_size or target.intermediate_size,
    }
    raw |= own[shape.kind](target, shape) if shape.kind in own else block_fields(target, shape)
    raw["layer_types"] = ["full_attention"] * raw["num_hidden_layers"]
    raw["architectures"] = [architecture(target.model_type, raw["architectures"])]
    raw.pop("_name_or_path", None)
    if raw.pop("per_layer_config", None):  # Gemma 4: full attention has heads of another size
        full = target.per_layer_config[target.layer_types.index("full_attention")]
        raw["global_head_dim"] = getattr(full, "head_dim", None) or target.head_dim
        if target.attention_k_eq_v:
            raw["num_global_key_value_heads"] = getattr(full, "num_key_value_heads", None)
    return raw


def block_fields(target: PreTrainedConfig, shape: DrafterShape) -> dict[str, Any]:
    """DSpark, and DFlash: the same without heads."""
    heads = shape.kind == "dspark"
    rank, confidence = (shape.markov_rank, shape.confidence_head) if heads else (0, False)
    return {
        "architectures": "DSpark",
        "num_hidden_layers": shape.depth,
        "block_size": shape.block_size,
        "mask_token_id": shape.mask_token_id if shape.mask_token_id >= 0 else target.vocab_size - 1,
        "target_layer_ids": list(shape.taps or even_taps(target.num_hidden_layers)),
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": confidence and rank > 0,
        "markov_rank": rank,
        "markov_head_type": shape.markov_head_type,
        "sample_from_anchor": shape.sample_from_anchor,
    }


def eagle3_fields(target: PreTrainedConfig, shape: DrafterShape) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "architectures": "Eagle3",
        "num_hidden_layers": 1,
        "ttt_length": shape.block_size,
        "target_layer_ids": list(shape.taps or even_taps(target.num_hidden_layers)),
    }
    return raw | ({"draft_vocab_size": shape.draft_vocabulary} if shape.draft_vocabulary else {})


def mtp_fields(target: PreTrainedConfig, shape: DrafterShape) -> dict[str, Any]:
    return {
        "architectures": "MTP",
        "num_hidden_layers": shape.block_size,
        "num_nextn_predict_layers": shape.block_size,
        "target_layer_ids": [target.num_hidden_layers - 1],
    }


def medusa_fields(target: PreTrainedConfig, shape: DrafterShape) -> dict[str, Any]:
    return {
        "architectures": "Medusa",
        "num_hidden_layers": 1,
        "medusa_num_heads": shape.block_size,
        "medusa_num_layers": shape.depth,
        "medusa_own_heads": shape.own_heads,
        "target_layer_ids": [target.num_hidden_layers - 1],
    }


def layer_skip_fields(target: PreTrainedConfig, shape: DrafterShape) -> dict[str, Any]:
    layers = target.num_hidden_layers
    exit_layer = shape.exit_layer if shape.exit_layer >= 0 else max(1, layers // 4) - 1
    if exit_layer >= layers:
        raise UserError(f"drafter: exit_layer {exit_layer} is past the target's layers 0..{layers - 1}; lower it")
    return {
        "architectures": "LayerSkip",
        "num_hidden_layers": exit_layer + 1,
        "block_size": shape.block_size,
        "target_layer_ids": [exit_layer],
    }


def token_counts(directory: str, vocabulary: int) -> Tensor:
    """How often each token is supervised in a data directory, [V]."""
    supervised = read(directory, "tokens")[read(directory, "mask") > 0]
    return torch.from_numpy(np.bincount(supervised, minlength=vocabulary)[:vocabulary])


@torch.no_grad()
def prune(drafter: Eagle3, head_VD: Tensor, count_V: Tensor) -> None:
    """Draft from the most frequent tokens, through a copy of their rows of the target's head."""
    kept_U = drafter.adopt(most_frequent(count_V, len(drafter.d2t)))
    drafter.lm_head.weight.copy_(head_VD[kept_U])  # type: ignore[operator,arg-type]


def create(
    target: nn.Module,
    shape: DrafterShape,
    *,
    anchors: int,
    seed: int,
    init: str = "",
    start: str = "target",
    data: str = "",
) -> tuple[checkpoint.TrainableModule, DrafterConfig]:
    """A trainable float32 drafter on the target's device, its embedding and head shared with the target and frozen.

    `data` is the training data's directory, whose counts choose a pruned vocabulary.
    """
    if shape.kind == "draft_model":
        student, own = create_student(target, shape, seed=seed, init=init, start=start)
        student.every_position = shape.every_position
        return student, own
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
        start_weights(drafter, config, target, from_target=start == "target")
        if isinstance(drafter, Eagle3) and drafter.pruned:
            prune(drafter, target.get_output_embeddings().weight, token_counts(data, config.vocab_size))  # type: ignore[operator]
    for name, parameter in drafter.named_parameters():
        parameter.requires_grad_(not checkpoint.is_borrowed(name, config))
    drafter.every_position = shape.every_position
    return drafter.train().to(device), config
