"""The shapes of published targets, so that a recipe can be checked and priced where no model hub can be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from dspark.models.loading import load_config

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-4B": QWEN3
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen/Qwen3-14B": QWEN3
    | {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    # the width is that of the published bytes of features a token; the rest is as in Gemma 3 12B: nearly, not exactly
    "google/gemma-4-12B-it": {
        "model_type": "gemma4_unified_text",
        "vocab_size": 262144,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
}


APPROXIMATE = ("google/gemma-4-12B-it",)


def text_config(target: str) -> tuple[PreTrainedConfig, str]:
    """(A target's text config, where it is from): a directory's own, the table's, or the hub's."""
    if not Path(target).exists() and target in PUBLISHED:
        fields = dict(PUBLISHED[target])
        return AutoConfig.for_model(fields.pop("model_type"), **fields), (
            "nearly its " if target in APPROXIMATE else "its "
        ) + "published numbers"
    return load_config(target), "its config.json"


def shrunk(config: PreTrainedConfig, *, vocabulary: int) -> PreTrainedConfig:
    """The same family with as many layers of the same types, and next to no width."""
    small: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "num_hidden_layers": config.num_hidden_layers,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    for name in ("layer_types", "rms_norm_eps", "hidden_size_per_layer_input", "final_logit_softcapping"):
        if hasattr(config, name):
            small[name] = getattr(config, name)
    if hasattr(config, "global_head_dim") or config.model_type.startswith("gemma4"):
        small |= {"global_head_dim": 16, "vocab_size_per_layer_input": vocabulary}
    if hasattr(config, "num_experts") and config.num_experts:
        small |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return AutoConfig.for_model(config.model_type, **small)
