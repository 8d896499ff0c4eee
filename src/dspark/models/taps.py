"""Reads the hidden states of chosen decoder layers while a Hugging Face model runs.

Tap i is the output of decoder layer i (0-based), −1 the embedding output (DFlash, §3; DeepSpec's `target_layer_ids`).
B sequences, T tokens, D hidden size, k taps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspark.common.errors import UserError


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The stack of decoder layers of a causal LM, whatever the family calls it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    return getattr(decoder, "language_model", decoder)


def check_taps(taps: Sequence[int], layer_count: int) -> None:
    """Raises UserError for a tap the target does not have."""
    for tap in taps:
        if not -1 <= tap < layer_count:
            raise UserError(
                f"tap {tap} is outside the target's layers -1..{layer_count - 1}; use a drafter made for it"
            )


@contextmanager
def tapping(model: PreTrainedModel, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While the context is open, every forward leaves the hidden states of `taps` in the dict it yields."""
    decoder, seen, handles = decoder_of(model), {}, []
    for tap in set(taps):

        def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...], tap: int = tap) -> None:
            seen[tap] = output[0] if isinstance(output, tuple) else output

        module = decoder.embed_tokens if tap == -1 else decoder.layers[tap]
        handles.append(module.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def features(model: PreTrainedModel, token_BT: Tensor, taps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What a drafter is trained on: (taps [B, T, k·D], last hidden state after the final norm [B, T, D])."""
    with tapping(model, taps) as seen:
        last_BTD = decoder_of(model)(input_ids=token_BT, use_cache=False).last_hidden_state
    return torch.cat([seen[tap] for tap in taps], dim=-1), last_BTD
