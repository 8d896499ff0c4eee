"""Self-speculation: the target's own first layers and a trained exit norm draft for the whole of it (arXiv 2309.08168).

V vocabulary, D hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn

from dspark.drafters.body import softcapped
from dspark.drafters.draft_model import DraftModel
from dspark.drafters.layers import BackboneConfig, RMSNorm
from dspark.models.batch import Ragged
from dspark.models.pages import KVPool
from dspark.models.target import Target
from dspark.models.truncated import truncated


class ExitHead(nn.Module):
    """What is trained and saved: the norm between the exit layer, which is the tap, and the target's LM head."""

    def __init__(self, config: BackboneConfig, lm_head: nn.Module, *, taps: tuple[int, ...], block_size: int) -> None:
        super().__init__()
        self.config = config
        self.taps = taps
        self.block_size = block_size
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = lm_head.requires_grad_(False)

    def logits(self, hidden_D: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D] after the norm."""
        return softcapped(self.lm_head(hidden_D), self.config.logit_softcap)


class LayerSkip(DraftModel):
    """A draft model made of the target's first layers.

    Its keys and values of committed tokens are the target's own: `share` reads them from the target's pages, and
    drafted tokens write theirs past the committed text, where the target's next forward overwrites them before
    anything reads them. On pages of its own (`allocate`) it recomputes what is committed, as any draft model.
    """

    def __init__(self, target: Target, head: ExitHead) -> None:
        (exit_layer,) = head.taps
        self.depth = exit_layer + 1
        model = Target(truncated(target.model, self.depth, head.norm))
        super().__init__(model, target.vocab_size, block_size=head.block_size)
        self.shared = False

    def share(self, pool: KVPool) -> None:
        """Use the target's pages of the first layers."""
        self.pool = KVPool(pool.keys[: self.depth], pool.values[: self.depth], pool.pages, pool.page_size)
        self.shared = True

    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        """Nothing to do on shared pages: the target's forward has written them."""
        if not self.shared:
            super().extend(batch, taps_TD)
