"""What the frozen target says about a batch: its taps, and its distribution at the slots that are drafted.

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

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(taps [B, S, k·D], last hidden state after the final norm [B, S, D])."""
        last_BSD = self.decoder(input_ids=batch.token_BS, use_cache=False).last_hidden_state
        if not self.taps:
            return last_BSD[..., :0], last_BSD
        return torch.cat([self.seen.__dict__[str(tap)] for tap in self.taps], dim=-1), last_BSD

    @torch.no_grad()
    def logits(self, last_ND: Tensor) -> Tensor:
        """The target's logits [N, V] of last hidden states."""
        return softcapped(self.head(last_ND), self.softcap)


class Remembered:
    """Keeps what a target said about each numbered piece of text: later epochs cost no target forward.

    Memory is (k + 1)·D·2 bytes a token, on the CPU; meant for small targets and little text.
    """

    def __init__(self, target: OnlineTarget) -> None:
        self.target, self.logits = target, target.logits
        self.pieces: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As the target's own call, for rows of one piece each. All is rounded to bfloat16, seen before or not."""
        token_BS, numbers = batch.token_BS, [number for (number,) in batch.pieces]
        if any(number not in self.pieces for number in numbers):
            taps_BSD, last_BSD = self.target(batch)
            self.dtype = last_BSD.dtype
            for row, number in enumerate(numbers):
                self.pieces[number] = (taps_BSD[row].bfloat16().cpu(), last_BSD[row].bfloat16().cpu())
        width, device = token_BS.shape[1], token_BS.device
        found = zip(*(self.pieces[number] for number in numbers), strict=True)
        taps_BSD, last_BSD = (torch.stack([fitted(x, width) for x in rows]).to(device, self.dtype) for rows in found)
        return taps_BSD, last_BSD


def fitted(x_SD: Tensor, width: int) -> Tensor:
    """Cut or padded with zeros to `width` positions: what lies past a piece's end is read by no label."""
    if len(x_SD) >= width:
        return x_SD[:width]
    return torch.nn.functional.pad(x_SD, (0, 0, 0, width - len(x_SD)))
