"""The target runs in the training step: nothing is stored.

B rows, S tokens, N wanted positions, V vocabulary, D hidden size, k taps.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dspark.drafters.body import softcapped
from dspark.models.taps import check_taps, decoder_of
from dspark.training.data import Batch


class OnlineTarget:
    """Runs the target in the training step: no storage, about 39 % more arithmetic than reading features from disk.

    Several threads may call it at once: each sees the hidden states of its own forward alone.
    """

    def __init__(self, model: nn.Module, taps: Sequence[int]) -> None:
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self.decoder: Any = decoder_of(model)
        self.softcap = getattr(self.decoder.config, "final_logit_softcapping", None) or 0.0
        self.taps = tuple(taps)
        self.seen = threading.local()
        check_taps(taps, len(self.decoder.layers))
        for tap in set(taps):

            def keep(_module: nn.Module, _args: object, output: Any, tap: int = tap) -> None:
                self.seen.__dict__[str(tap)] = output[0] if isinstance(output, tuple) else output

            module = self.decoder.embed_tokens if tap == -1 else self.decoder.layers[tap]
            module.register_forward_hook(keep)

    @property
    def hidden(self) -> int:
        """D."""
        return int(self.decoder.config.hidden_size)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(taps [B, S, k·D], last hidden state after the final norm [B, S, D])."""
        # Positions that restart make transformers keep the documents of a row apart.
        order_S = torch.arange(batch.token_BS.shape[1], device=batch.token_BS.device)
        packed = any(len(pieces) > 1 for pieces in batch.pieces)
        where = {"position_ids": order_S - batch.start_BS} if packed else {}
        last_BSD = self.decoder(input_ids=batch.token_BS, use_cache=False, **where).last_hidden_state
        if not self.taps:
            return last_BSD[..., :0], last_BSD
        return torch.cat([self.seen.__dict__[str(tap)] for tap in self.taps], dim=-1), last_BSD

    @torch.no_grad()
    def logits(self, last_ND: Tensor) -> Tensor:
        """The target's logits [N, V] of last hidden states."""
        return softcapped(self.head(last_ND), self.softcap)

    def flush(self) -> None:
        """Nothing is stored."""
