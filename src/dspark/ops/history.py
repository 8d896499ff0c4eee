"""Token counts of the text before each row, for the penalties that need them; made only if a request uses one.

R requests, K block slots, V vocabulary, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class History:
    """What stands before each of B rows: which tokens the prompt has and how often the output has each."""

    prompt_BV: Tensor  # bool
    output_BV: Tensor  # float32 counts

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        outputs: Sequence[Sequence[int]],
        vocabulary: int,
        device: torch.device | str = "cpu",
    ) -> History:
        """One row per request, from its prompt and all its output tokens so far (the anchor included)."""
        prompt_BV = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
        output_BV = torch.zeros(len(prompts), vocabulary)
        for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            prompt_BV[row, torch.tensor(prompt, dtype=torch.int64)] = True
            output_BV[row] = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=vocabulary)
        return cls(prompt_BV.to(device), output_BV.to(device))

    def advanced(self, token_B: Tensor) -> History:
        """The history one output token later."""
        one_B1 = torch.ones_like(token_B, dtype=self.output_BV.dtype).unsqueeze(1)
        return History(self.prompt_BV, self.output_BV.scatter_add(1, token_B.unsqueeze(1), one_B1))

    def select(self, rows: Sequence[int]) -> History:
        """The rows of some requests, in the order given."""
        index_B = torch.tensor(rows, device=self.output_BV.device)
        return History(self.prompt_BV[index_B], self.output_BV[index_B])

    def rows(self, plan: Sequence[int], token_RK: Tensor | None) -> History:
        """The histories of a verification's rows: request r has 1 + plan[r] rows, row k after k drafted tokens."""
        request = [r for r, length in enumerate(plan) for _ in range(1 + length)]
        depth = [k for length in plan for k in range(1 + length)]
        expanded = self.select(request)
        drafted = [(row, request[row], slot) for row, k in enumerate(depth) for slot in range(k)]
        if drafted:
            assert token_RK is not None, "a plan above 0 needs drafted tokens"
            row_N, request_N, slot_N = torch.tensor(drafted, device=token_RK.device).T
            one_N = torch.ones(len(drafted), dtype=self.output_BV.dtype, device=token_RK.device)
            expanded.output_BV.index_put_((row_N, token_RK[request_N, slot_N]), one_N, accumulate=True)
        return expanded


class Counted:
    """The counts of one growing text, kept up with it: a round counts its new tokens alone."""

    def __init__(self, prompt: Sequence[int], vocabulary: int, device: torch.device | str = "cpu") -> None:
        self.prompt_V = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.prompt_V[torch.tensor(prompt, dtype=torch.int64, device=device)] = True
        self.output_V = torch.zeros(vocabulary, device=device)
        self.counted = 0  # tokens of the output

    def follow(self, tokens: Sequence[int]) -> None:
        """Count the output's next tokens."""
        index = torch.tensor(tokens, dtype=torch.int64, device=self.output_V.device)
        self.output_V.index_add_(0, index, torch.ones(len(tokens), device=index.device))
        self.counted += len(tokens)

    @staticmethod
    def together(texts: Sequence[Counted]) -> History:
        """One row per text."""
        return History(torch.stack([text.prompt_V for text in texts]), torch.stack([text.output_V for text in texts]))
