"""Sequential heads that make a block's slots depend on the tokens drawn before them, and the confidence head.

... leading dimensions, K block slots, V vocabulary, D hidden size, r Markov rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VanillaMarkov(nn.Module):
    """B_k = W1[x_{k-1}] W2 (DSpark, eq. 5): a bias on the base logits from the previous token alone."""

    def __init__(self, vocabulary: int, rank: int, hidden: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, vocabulary, bias=False)

    def start(self, hidden_D: Tensor) -> Tensor:
        """State before the first slot, [..., r]; heads without a memory carry the zeros along."""
        return hidden_D.new_zeros((*hidden_D.shape[:-1], self.markov_w1.embedding_dim))

    def latent(self, embedding_r: Tensor, hidden_D: Tensor, state_r: Tensor) -> tuple[Tensor, Tensor]:
        """One slot: (what W2 is applied to, the next state), each [..., r]."""
        return embedding_r, state_r

    def unroll(self, embedding_Kr: Tensor, hidden_KD: Tensor) -> Tensor:
        """All slots of a block at once, [..., K, r], when every previous token is known (teacher forcing)."""
        return self.latent(embedding_Kr, hidden_KD, embedding_Kr)[0]


class GatedMarkov(VanillaMarkov):
    """B_k = W2 (σ(W[h_k; W1[x_{k-1}]] + b) ⊙ W1[x_{k-1}])."""

    def __init__(self, vocabulary: int, rank: int, hidden: int) -> None:
        super().__init__(vocabulary, rank, hidden)
        self.gate_proj = nn.Linear(hidden + rank, rank)

    def latent(self, embedding_r: Tensor, hidden_D: Tensor, state_r: Tensor) -> tuple[Tensor, Tensor]:
        gate_r = torch.sigmoid(self.gate_proj(torch.cat((hidden_D, embedding_r), dim=-1)))
        return gate_r * embedding_r, state_r


class RNNMarkov(VanillaMarkov):
    """z = [s_{k-1}; W1[x_{k-1}]; h_k] → gate, candidate, output; B_k = W2 tanh(output) (DSpark, eq. 6)."""

    def __init__(self, vocabulary: int, rank: int, hidden: int) -> None:
        super().__init__(vocabulary, rank, hidden)
        self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def latent(self, embedding_r: Tensor, hidden_D: Tensor, state_r: Tensor) -> tuple[Tensor, Tensor]:
        joint = self.joint_proj(torch.cat((state_r, embedding_r, hidden_D), dim=-1))
        gate_r, candidate_r, output_r = joint.chunk(3, dim=-1)
        gate_r = torch.sigmoid(gate_r)
        return torch.tanh(output_r), gate_r * state_r + (1 - gate_r) * torch.tanh(candidate_r)

    def unroll(self, embedding_Kr: Tensor, hidden_KD: Tensor) -> Tensor:
        state_r, latents = self.start(hidden_KD[..., 0, :]), []
        for slot in range(embedding_Kr.shape[-2]):
            latent_r, state_r = self.latent(embedding_Kr[..., slot, :], hidden_KD[..., slot, :], state_r)
            latents.append(latent_r)
        return torch.stack(latents, dim=-2)


MARKOV_HEADS: dict[str, type[VanillaMarkov]] = {"vanilla": VanillaMarkov, "gated": GatedMarkov, "rnn": RNNMarkov}


class ConfidenceHead(nn.Module):
    """Logit of c_k = σ(w·[h_k; W1[x_{k-1}]] + b), the chance that slot k is accepted (DSpark, eq. 7)."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.rank = rank  # 0: the head sees h_k alone
        self.proj = nn.Linear(hidden + rank, 1)

    def split(self, hidden_D: Tensor) -> tuple[Tensor, Tensor]:
        """What the hidden states [..., D] say, [...], and the weight [r] of the previous token's embedding, float32."""
        weight, width = self.proj.weight[0].float(), hidden_D.shape[-1]
        return hidden_D.float() @ weight[:width] + self.proj.bias.float(), weight[width:]

    def forward(self, hidden_D: Tensor, embedding_r: Tensor) -> Tensor:
        seen = torch.cat((hidden_D, embedding_r), dim=-1) if self.rank else hidden_D
        return self.proj(seen).squeeze(-1)
