"""The `drafter` section of a recipe: which kind of drafter, and what its kind lets one choose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from dspark.common.errors import UserError
from dspark.training.objectives import Weights

COMMON = ("kind", "block_size", "every_position")
BLOCK = (*COMMON, "layers", "taps", "mask_token_id", "intermediate_size", "sample_from_anchor")
FIELDS = {
    "dspark": (*BLOCK, "markov_rank", "markov_head_type", "confidence_head"),
    "dflash": BLOCK,
    "eagle3": (*COMMON, "taps", "intermediate_size", "draft_vocabulary"),
    "mtp": (*COMMON, "intermediate_size"),
    "medusa": (*COMMON, "layers", "own_heads"),
    "layer_skip": (*COMMON, "exit_layer"),
    "draft_model": (*COMMON, "layers", "intermediate_size"),
}
LAYERS = {"dspark": 5, "dflash": 5, "medusa": 1}
"""What `layers: 0` means."""

DEFAULT_LOSS = {
    "dspark": Weights(),
    "dflash": Weights(cross_entropy=1.0, l1=0.0, confidence=0.0),
    "eagle3": Weights(cross_entropy=0.0, l1=0.0, kl=1.0, confidence=0.0, decay=0.8, decay_kind="geometric"),
    "mtp": Weights(cross_entropy=1.0, l1=0.0, confidence=0.0, decay=1.0, decay_kind="geometric"),
    "medusa": Weights(cross_entropy=1.0, l1=0.0, confidence=0.0, decay=0.8, decay_kind="geometric"),
    "layer_skip": Weights(cross_entropy=0.0, l1=0.0, kl=1.0, confidence=0.0, decay=1.0, decay_kind="geometric"),
    "draft_model": Weights(cross_entropy=0.0, l1=1.0, kl=0.1, confidence=0.0, decay=1.0, decay_kind="geometric"),
}
"""The published losses: what a recipe's `loss` section starts from. DFlash, MTP (every depth alike) and Medusa learn
the tokens, Eagle-3 the target's distribution, draft models total variation, which is one minus acceptance."""


@dataclass(frozen=True)
class DrafterShape:
    """The drafter to train. What is not said here is the target's: hidden size, heads, MLP width, vocabulary."""

    kind: str = "dspark"
    layers: int = 0  # of backbone, Medusa head or draft model; 0: 5, Medusa 1, draft model half the target's
    block_size: int = 7  # γ; Eagle-3: steps of the training-time test, MTP: modules, Medusa: heads
    taps: tuple[int, ...] = ()  # (): five, spread evenly as in DeepSpec
    every_position: bool = False  # draft from every supervised position instead of `anchors` of them
    mask_token_id: int = -1  # −1: the last id of the vocabulary
    markov_rank: int = 256  # 0 and no confidence head: DFlash
    markov_head_type: str = "vanilla"
    confidence_head: bool = True
    sample_from_anchor: bool = True  # false: the anchor and γ masks go in, the mask slots are read (classic DFlash)
    intermediate_size: int = 0  # 0: the target's
    draft_vocabulary: int = 0  # Eagle-3: so many of the data's most frequent tokens; 0: all, by the target's own head
    own_heads: bool = False  # Medusa: an LM head for every slot instead of the target's
    exit_layer: int = -1  # layer-skip: the last of the target's layers that drafts; −1: a quarter of them

    def __post_init__(self) -> None:
        if self.kind not in FIELDS:
            raise UserError(f"drafter: kind {self.kind!r} is not known; use one of {', '.join(FIELDS)}")
        self.check_fields(f.name for f in fields(self) if getattr(self, f.name) != f.default)
        for name, least in (("block_size", 1), ("layers", 0), ("draft_vocabulary", 0), ("exit_layer", -1)):
            if getattr(self, name) < least:
                raise UserError(f"drafter: {name} is {getattr(self, name)}; give {least} or more")

    def check_fields(self, names: Iterable[str]) -> None:
        """Raises UserError for a field that this kind of drafter does not have."""
        known = FIELDS[self.kind]
        for name in names:
            if name not in known:
                raise UserError(
                    f"drafter: {name} does not belong to kind {self.kind}, which has {', '.join(known)}; drop it"
                )

    @property
    def depth(self) -> int:
        """Layers of the backbone, or of a Medusa head."""
        return self.layers or LAYERS.get(self.kind, 1)

    def as_plain(self) -> dict[str, Any]:
        """The fields of this kind as JSON-like values."""
        plain = {name: value for name, value in asdict(self).items() if name in FIELDS[self.kind]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
