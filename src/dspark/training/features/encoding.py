"""Hidden states of one piece of text as bytes: bfloat16, or fp8 with a power of two for each channel.

S tokens of the piece, n of them whose last hidden state a loss can read, W channels, D hidden size, k taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FORMATS = {"bfloat16": 2, "float8": 1}
"""Bytes of a number."""
LARGEST = 448.0  # of float8_e4m3fn


class Piece(NamedTuple):
    """What is kept of a piece."""

    taps_SW: Tensor
    last_nD: Tensor


@dataclass(frozen=True)
class Encoding:
    """A function of the piece's numbers alone, so that a value is the same whenever it was written.

    An e4m3 number has 3 bits behind the point over 15 binades, so outliers of one token cost the others nothing; the
    power of two only brings each channel's largest value below e4m3's own, and costs a byte a channel and piece.
    """

    format: str  # one of FORMATS
    taps: int  # k·D
    hidden: int  # D

    @property
    def scales(self) -> int:
        """Bytes of a piece beside its numbers."""
        return self.taps + self.hidden if self.format == "float8" else 0

    def size(self, tokens: int, supervised: int) -> int:
        """Bytes of a piece with this many tokens, and this many whose last hidden state is kept."""
        return self.scales + FORMATS[self.format] * (tokens * self.taps + supervised * self.hidden)

    def encode(self, piece: Piece) -> Tensor:
        """uint8, of `size` bytes, on the CPU."""
        if self.format == "bfloat16":
            return torch.cat([x.bfloat16().flatten().view(torch.uint8) for x in piece]).cpu()
        powers, numbers = zip(*(shrink(x.float()) for x in piece), strict=True)
        return torch.cat([x.flatten().view(torch.uint8) for x in (*powers, *numbers)]).cpu()

    def decode(self, data: Tensor, tokens: int, dtype: torch.dtype) -> Piece:
        """The piece back from its bytes, rounded."""
        if self.format == "bfloat16":
            taps, last = data.view(torch.bfloat16).split([tokens * self.taps, data.numel() // 2 - tokens * self.taps])
            return Piece(taps.view(tokens, -1).to(dtype), last.view(-1, self.hidden).to(dtype))
        power_W, number = data[: self.scales].view(torch.int8), data[self.scales :].view(torch.float8_e4m3fn)
        taps_SW = number[: tokens * self.taps].view(tokens, self.taps).to(dtype)
        last_nD = number[tokens * self.taps :].view(-1, self.hidden).to(dtype)
        factor_W = torch.exp2(power_W.float()).to(dtype)  # a power of two is exact in every dtype
        return Piece(taps_SW * factor_W[: self.taps], last_nD * factor_W[self.taps :])


def shrink(x_SW: Tensor) -> tuple[Tensor, Tensor]:
    """(powers [W] int8, numbers [S, W] e4m3) with x ≈ number · 2^power."""
    if not len(x_SW):
        return torch.zeros(x_SW.shape[1], dtype=torch.int8, device=x_SW.device), x_SW.to(torch.float8_e4m3fn)
    power_W = torch.frexp(x_SW.abs().amax(0) / LARGEST).exponent.clamp(-126, 126)
    return power_W.to(torch.int8), (x_SW * torch.exp2(-power_W.float())).to(torch.float8_e4m3fn)
