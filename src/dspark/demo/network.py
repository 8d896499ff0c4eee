"""The demo target as a model: built, deepened, and written as any other Hugging Face folder."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from dspark.common.files import replacing_directory
from dspark.demo.recipe import Architecture


def short_causal_attention(
    module: nn.Module, query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention by plain products, 256 queries at a time over the keys they can see.

    B batch, H heads, K key heads, T tokens, E head dim. For rows this short the CPU's flash kernel takes 1.5-3 times
    as long, forward and backward together.
    """
    scale, groups = options["scaling"], query_BHTE.size(1) // key_BKTE.size(1)
    key_BHTE, value_BHTE = (x.repeat_interleave(groups, dim=1) for x in (key_BKTE, value_BKTE))
    parts = []
    for start in range(0, query_BHTE.size(2), 256):
        query_BHQE = query_BHTE[:, :, start : start + 256]
        end = start + query_BHQE.size(2)
        score_BHQT = (query_BHQE * scale) @ key_BHTE[:, :, :end].mT
        hidden_QT = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
        weight_BHQT = torch.softmax(score_BHQT.masked_fill(hidden_QT, float("-inf")), -1)
        parts.append(weight_BHQT @ value_BHTE[:, :, :end])
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("dspark_short_causal", short_causal_attention)
AttentionMaskInterface.register("dspark_short_causal", lambda *_, **__: None)


def build_model(architecture: Architecture, layers: int, end_id: int) -> Qwen3ForCausalLM:
    """A fresh model whose layers begin as the identity: their output projections are zero."""
    config = Qwen3Config(
        **{k: v for k, v in asdict(architecture).items() if k != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta},
        num_hidden_layers=layers,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=None,
        attn_implementation="dspark_short_causal",
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        silence(layer)
    return model


def deepened(model: Qwen3ForCausalLM, architecture: Architecture, layers: int, grow: str) -> Qwen3ForCausalLM:
    """A deeper model made of a trained one's layers.

    "copy": 0123 becomes 01230123 (Du et al. 2024, G_stack). "identity": 0123 becomes 0 0' 1 2 2' 3, evenly, where a
    primed copy's output projections are zero, so that the deeper model begins as the very same function.
    """
    depth = model.config.num_hidden_layers
    if depth == layers:
        return model
    deep = build_model(architecture, layers, model.config.eos_token_id)
    deep.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(model.model.norm.state_dict())
    sources = [i % depth if grow == "copy" else i * depth // layers for i in range(layers)]
    for i, (source, layer) in enumerate(zip(sources, deep.model.layers, strict=True)):
        layer.load_state_dict(model.model.layers[source].state_dict())
        if grow == "identity" and i and sources[i - 1] == source:
            silence(layer)
    return deep


def silence(layer: Any) -> None:
    """Make a layer the identity: its output projections become zero."""
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)


def export(model: Qwen3ForCausalLM, extras: list[Path], target: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load, `extras` beside it, put in place by renaming."""
    logging.disable_progress_bar()
    copy = Qwen3ForCausalLM(deepcopy(model.config)).to(dtype)
    copy.load_state_dict(model.state_dict())
    copy.config.dtype = dtype
    end = model.config.eos_token_id
    copy.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end, do_sample=False)
    with replacing_directory(target) as partial:
        copy.save_pretrained(partial, max_shard_size="15MB")
        for file in extras:
            shutil.copy(file, partial)
