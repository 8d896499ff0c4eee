"""Whether a drafter fits its target: vocabulary, hidden size, taps, tokenizer. Both clashing numbers are named.

V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dspark.common.errors import UserError
from dspark.drafters.config import DrafterConfig
from dspark.models.taps import decoder_of


class HasModel(Protocol):
    """A `dspark.models.target.Target`, or anything else that holds a Hugging Face causal LM."""

    model: nn.Module


@dataclass(frozen=True)
class TargetParts:
    """What a drafter borrows from its target: the frozen embedding and LM head, and the numbers it must fit."""

    embedding_VD: Tensor
    head: nn.Module  # [..., D] -> [..., V]; a linear map, its weights maybe packed for a kernel
    layers: int
    name: str

    @classmethod
    def of(cls, target: nn.Module | HasModel) -> TargetParts:
        """Parts of a causal LM or of a Target: the model's own, not copies."""
        model: Any = target if isinstance(target, nn.Module) else target.model
        decoder: Any = decoder_of(model)
        return cls(
            embedding_VD=model.get_input_embeddings().weight,
            head=model.get_output_embeddings(),
            layers=len(decoder.layers),
            name=str(getattr(model.config, "name_or_path", "") or type(model).__name__),
        )


def check_fit(drafter: DrafterConfig, target: TargetParts, origin: str) -> None:
    """Raises UserError unless the drafter was made for a target of this shape."""
    vocabulary, hidden = target.embedding_VD.shape
    if drafter.vocab_size != vocabulary:
        raise UserError(
            f"{origin} drafts over a vocabulary of {drafter.vocab_size}, the target {target.name} has {vocabulary}; "
            "use the drafter trained for this target"
        )
    if drafter.backbone.hidden_size != hidden:
        raise UserError(
            f"{origin} has hidden size {drafter.backbone.hidden_size}, the target {target.name} has {hidden}; "
            "use the drafter trained for this target"
        )
    if drafter.num_target_layers not in (None, target.layers):
        raise UserError(
            f"{origin} was made for {drafter.num_target_layers} target layers, {target.name} has {target.layers}; "
            "use the drafter trained for this target"
        )
    for tap in drafter.taps:
        if not -1 <= tap < target.layers:
            raise UserError(
                f"{origin} taps target layer {tap}, the target {target.name} has layers 0..{target.layers - 1}; "
                "use the drafter trained for this target"
            )


def check_tokenizers(draft: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, origin: str) -> None:
    """Raises UserError unless a draft model's tokens are the target's, id by id."""
    ours, theirs = draft.get_vocab(), target.get_vocab()
    if len(ours) != len(theirs):
        raise UserError(
            f"{origin} has a tokenizer of {len(ours)} tokens, the target's has {len(theirs)}; "
            "use a draft model with the target's tokenizer"
        )
    for token, number in ours.items():
        if theirs.get(token) != number:
            raise UserError(
                f"{origin} has token {token!r} at {number}, the target at {theirs.get(token)}; "
                "use a draft model with the target's tokenizer"
            )
