"""The draft model a recipe distils: given, or a thinner copy of the target."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dspark.common.errors import UserError
from dspark.drafters.config import DrafterConfig
from dspark.drafters.layers import BackboneConfig
from dspark.drafters.student import Student
from dspark.models.loading import load_causal_lm
from dspark.models.taps import decoder_of
from dspark.training.shape import DrafterShape
from dspark.training.start import copy_layer, spread


def create_student(
    target: nn.Module, shape: DrafterShape, *, seed: int, init: str = "", start: str = "target"
) -> tuple[Student, DrafterConfig]:
    """A trainable float32 causal LM: the one in the directory `init`, or `layers` of the target's, copied or random.

    Raises UserError where `init` has another vocabulary than the target.
    """
    head: Any = target.get_output_embeddings()  # type: ignore[operator]
    device, vocabulary = head.weight.device, head.out_features
    if init:
        model = load_causal_lm(init, dtype="float32", device=str(device))
    else:
        model = thinner(target, shape, seed=seed, copied=start == "target").to(device)
    own = model.get_output_embeddings().out_features
    if own != vocabulary:
        raise UserError(f"init {init} has a vocabulary of {own}, the target {vocabulary}; use one with its tokenizer")
    model.requires_grad_(True)
    return Student(model, block_size=shape.block_size).train(), student_config(model, shape)


def thinner(target: nn.Module, shape: DrafterShape, *, seed: int, copied: bool) -> PreTrainedModel:
    """A model of the target's family with fewer layers, the first and the last of the target's among them."""
    config: PreTrainedConfig = target.config.get_text_config()  # type: ignore[union-attr,operator]
    whole = config.num_hidden_layers
    count = shape.layers or max(1, whole // 2)
    if count > whole:
        raise UserError(f"drafter: layers is {count}, the target has {whole}; give {whole} or fewer")
    fields: dict[str, Any] = config.to_dict() | {"num_hidden_layers": count}
    if fields.get("layer_types"):
        fields["layer_types"] = spread(fields["layer_types"], count)
    if shape.intermediate_size:
        fields["intermediate_size"] = shape.intermediate_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(type(config).from_dict(fields), dtype=torch.float32)
    if copied:
        decoder, source = decoder_of(model), decoder_of(target)  # type: ignore[arg-type]
        for layer, theirs in zip(decoder.layers, spread(list(source.layers), count), strict=True):
            copy_layer(theirs, layer)
        rest = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("layers.")}
        decoder.load_state_dict(rest, strict=False)
        model.get_output_embeddings().load_state_dict(target.get_output_embeddings().state_dict())  # type: ignore[operator]
    return model


def student_config(model: PreTrainedModel, shape: DrafterShape) -> DrafterConfig:
    """What is written beside the weights is the model's own config."""
    config = model.config.get_text_config()
    raw = config.to_dict() | {"architectures": [type(model).__name__]}
    raw.pop("_name_or_path", None)
    return DrafterConfig(
        kind="draft_model",
        backbone=BackboneConfig.of(config, 0),
        vocab_size=model.get_output_embeddings().out_features,
        block_size=shape.block_size,
        taps=(),
        raw=raw,
    )
