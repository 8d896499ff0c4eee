"""Eagle-3: an autoregressive one-layer drafter over [token embedding; target features], the field's baseline.

B sequences, S tokens, V vocabulary, D hidden size, k taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dspark.drafters.layers import MLP, Attend, Attention, BackboneConfig, RMSNorm, Rotary, RotaryEmbedding
from dspark.ops.step_attention import step_attention


class EagleLayer(nn.Module):
    """A decoder layer whose attention reads [norm(embedding); norm(hidden)]; the residual is the hidden state."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, width=2 * config.hidden_size)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embedding: Tensor, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        both = torch.cat((self.input_layernorm(embedding), self.hidden_norm(hidden)), dim=-1)
        mixed = attend(0, self.self_attn.query(both, rotary), *self.self_attn.key_value(both, rotary))
        hidden = hidden + self.self_attn.o_proj(mixed.flatten(-2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Chain(NamedTuple):
    """A drafted chain: hidden_BK1D (the state each step starts from, and the last), logits_BKV, token_BK."""

    hidden: Tensor
    logits: Tensor
    token: Tensor


class Eagle3(nn.Module):
    """One layer, `fc` over the taps, `norm` before the LM head. Position t joins feature t with token t+1."""

    def __init__(
        self,
        config: BackboneConfig,
        embed_tokens: nn.Embedding,
        lm_head: nn.Module,
        *,
        taps: tuple[int, ...],
        block_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.taps = taps
        self.block_size = block_size
        self.embed_tokens = embed_tokens.requires_grad_(False)
        self.lm_head = lm_head.requires_grad_(False)
        self.fc = nn.Linear(config.tap_count * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([EagleLayer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)

    def run(
        self, token_BS: Tensor, hidden_BSD: Tensor, start: int, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One causal pass at positions start.. over dense keys and values of what came before; (hidden, past)."""
        position_S = torch.arange(start, start + token_BS.shape[1], device=token_BS.device)

        def attend(_layer: int, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
            past.append((k_BSGd, v_BSGd))
            keys, values = (torch.cat(parts, dim=1) for parts in zip(*past, strict=True))
            return step_attention(q_BSHd, keys, values, self.config.scale)

        rotary = self.rotary(position_S, hidden_BSD.dtype)
        return self.layers[0](self.embed_tokens(token_BS), hidden_BSD, rotary, attend), past

    @torch.no_grad()
    def chain(self, taps_BSkD: Tensor, next_token_BS: Tensor, steps: int) -> Chain:
        """Draft `steps` tokens greedily after a prefix; next_token_BS is token t+1 beside the taps of token t."""
        hidden_BSD, past = self.run(next_token_BS, self.fc(taps_BSkD), 0, [])
        hidden_B1D, position = hidden_BSD[:, -1:], next_token_BS.shape[1]
        hiddens, logits, tokens = [hidden_B1D], [], []
        for _ in range(steps):
            logits_B1V = self.lm_head(self.norm(hidden_B1D))
            token_B1 = logits_B1V.argmax(-1)
            hidden_B1D, past = self.run(token_B1, hidden_B1D, position, past)
            position += 1
            hiddens.append(hidden_B1D)
            logits.append(logits_B1V)
            tokens.append(token_B1)
        return Chain(torch.cat(hiddens, 1), torch.cat(logits, 1), torch.cat(tokens, 1))
