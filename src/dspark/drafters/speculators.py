"""Drafters in the speculators format, which vLLM documents: DSpark, DFlash in both slot layouts, Eagle-3.

An aux layer id counts from the embedding: id i is the input of target layer i, so tap i − 1 here. `block_size` counts
the inputs of a block: one more than are drafted in the layout that does not draft from the anchor.
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dspark.common.errors import UserError
from dspark.drafters.config import DrafterConfig, architecture, refuse_causal_windows, transformers_config

ARCHITECTURES = {"dspark": "DSparkDraftModel", "dflash": "DFlashDraftModel", "eagle3": "Eagle3DraftModel"}
AUX = {"eagle3": "eagle_aux_hidden_state_layer_ids"}
OTHER_AUX = "aux_hidden_state_layer_ids"
HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
KEPT = ("num_target_layers", "num_anchors", "step_loss_decay", "draft_num_hidden_layers", "dtype")  # in both
OWN = {
    *(*HEADS, *KEPT, "architectures", "block_size", "mask_token_id", "target_layer_ids", "sample_from_anchor"),
    *("ttt_length", "draft_vocab_size", "target_model_name_or_path"),
}  # of the native config: not the layer's
NAMELESS = ("_name_or_path", "architectures", "dtype")  # a layer's config belongs to no model of its own
DIFFERENT = {
    "norm_before_residual": "its residual is normed first",
    "norm_before_fc": "its features are normed first",
    "embed_requires_grad": "its embedding is not the target's",
    "shift_label": "its labels are shifted",
}
"""Fields that, when true, mean a computation this package does not have."""
UNUSED = ("verifier_norm.weight", "verifier_lm_head.weight")


def recognised(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this format."""
    return "speculators_model_type" in raw


def native(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The native config. Raises UserError for a kind or a variant that this package does not run."""
    kind, layer = raw["speculators_model_type"], raw.get("transformer_layer_config")
    if kind not in ARCHITECTURES:
        raise UserError(f"{origin}: speculators_model_type {kind!r} is not read; known are {', '.join(ARCHITECTURES)}")
    if not isinstance(layer, dict) or "model_type" not in layer:
        raise UserError(f"{origin}: transformer_layer_config names no model_type; export the drafter again")
    for name, meaning in DIFFERENT.items():
        if raw.get(name):
            raise UserError(f"{origin}: {name} is true ({meaning}), which is not supported; train without it")
    if raw.get("projector_type", "dflash") != "dflash":
        raise UserError(f"{origin}: projector_type {raw['projector_type']!r} is not supported; use a DFlash or DSpark")
    # the layer's config is written as its difference from the defaults: its class fills them in
    flat = transformers_config(layer, origin).to_dict() | {"tie_word_embeddings": False}
    flat = {name: value for name, value in flat.items() if name not in NAMELESS}
    flat |= {name: raw[name] for name in KEPT if name in raw}
    if not raw.get("sliding_window_non_causal"):
        refuse_causal_windows(flat, origin)
    verifier = (raw.get("speculators_config") or {}).get("verifier") or {}
    if verifier.get("name_or_path"):
        flat["target_model_name_or_path"] = verifier["name_or_path"]
    flat["target_layer_ids"] = taps_of(raw, origin)
    return flat | (eagle3_fields(raw, flat, origin) if kind == "eagle3" else block_fields(raw, flat, origin))


def taps_of(raw: Mapping[str, Any], origin: str) -> list[int]:
    """Outputs of target layers, −1 for the embedding."""
    ids = raw.get(AUX["eagle3"]) or raw.get(OTHER_AUX)
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids) or not ids:
        raise UserError(
            f"{origin}: {OTHER_AUX} is {ids!r}; list the layers the drafter was trained on, 0 for the embedding"
        )
    return [i - 1 for i in ids]


def block_fields(raw: Mapping[str, Any], flat: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What DSpark and DFlash have of their own. A missing `sample_from_anchor` means the older layout, without."""
    anchor, vocabulary = bool(raw.get("sample_from_anchor", False)), flat["vocab_size"]
    drafted = raw.get("draft_vocab_size") or vocabulary
    if drafted != vocabulary:
        raise UserError(
            f"{origin}: draft_vocab_size {drafted} is not the vocabulary of {vocabulary}; block drafters draft from "
            "all of it here, train with the whole vocabulary"
        )
    slots = raw.get("block_size")
    if type(slots) is not int or slots < 2 - anchor:
        raise UserError(f"{origin}: block_size is {slots!r}; give a whole number of {2 - anchor} or more")
    heads = raw["speculators_model_type"] == "dspark"
    return {
        "architectures": [architecture(flat["model_type"], "DSpark")],
        "block_size": slots if anchor else slots - 1,
        "mask_token_id": raw.get("mask_token_id"),
        "sample_from_anchor": anchor,
        "markov_rank": raw.get("markov_rank", 0) if heads else 0,
        "markov_head_type": raw.get("markov_head_type", "vanilla"),
        "enable_confidence_head": bool(raw.get("enable_confidence_head", False)) and heads,
        "confidence_head_with_markov": bool(raw.get("confidence_head_with_markov", False)) and heads,
    }


def eagle3_fields(raw: Mapping[str, Any], flat: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What Eagle-3 has of its own: always an LM head that was trained with it, over all or part of the vocabulary."""
    if flat["num_hidden_layers"] != 1:
        raise UserError(f"{origin}: num_hidden_layers is {flat['num_hidden_layers']}; an Eagle-3 drafter has 1 here")
    methods = (raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return {
        "architectures": [architecture(flat["model_type"], "Eagle3")],
        "ttt_length": methods[0].get("speculative_tokens") or raw.get("ttt_length"),
        "draft_vocab_size": raw.get("draft_vocab_size") or flat["vocab_size"],
    }


def native_tensors(tensors: dict[str, Tensor], config: DrafterConfig) -> dict[str, Tensor]:
    """Tensors as the native format has them: without training's own, and without maps of a whole vocabulary."""
    unused = UNUSED if config.draft_vocab_size else (*UNUSED, "d2t", "t2d")
    return {name: tensor for name, tensor in tensors.items() if name not in unused}


def written(config: DrafterConfig) -> dict[str, Any]:
    """config.json in this format. Raises UserError for a kind it does not have."""
    raw, kind = config.raw, config.kind
    if kind not in ARCHITECTURES:
        raise UserError(f"a drafter of kind {kind} has no speculators format; {', '.join(ARCHITECTURES)} have one")
    layer = transformers_config({name: value for name, value in raw.items() if name not in OWN}, "config.json")
    fields = {name: raw[name] for name in KEPT if name in raw} | {
        "architectures": [ARCHITECTURES[kind]],
        "speculators_model_type": kind,
        "transformer_layer_config": {name: value for name, value in layer.to_dict().items() if name not in NAMELESS},
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": config.backbone.hidden_size,
        "tie_word_embeddings": False,
        AUX.get(kind, OTHER_AUX): [tap + 1 for tap in config.taps],
        "speculators_config": proposal(config),
    }
    if kind == "eagle3":
        return fields | {"norm_before_residual": False, "embed_requires_grad": False}
    fields |= {
        "block_size": config.block_size + (not config.sample_from_anchor),
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": any(config.backbone.windows),
    }
    heads = {
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.enable_confidence_head and config.confidence_rank > 0,
    }
    return fields | (heads if kind == "dspark" else {})


def proposal(config: DrafterConfig) -> dict[str, Any]:
    """The `speculators_config`: how many tokens are proposed, and for which target."""
    model_type = config.backbone.model_type
    return {
        "algorithm": config.kind,
        "proposal_methods": [
            {
                "proposal_type": "greedy",
                "speculative_tokens": config.block_size,
                "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            }
        ],
        "default_proposal_method": "greedy",
        "verifier": {
            "name_or_path": config.raw.get("target_model_name_or_path"),
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
            if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            else [],
        },
    }
