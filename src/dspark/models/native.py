"""A stack of plain decoder layers run by one CPU kernel (ops/cpu/decoder.h) instead of a compiled graph.

Llama, Mistral, Qwen2 and Qwen3 targets and the drafters built of the same block fit; whatever does not is compiled.
P positions, d head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspark.ops.linear import STEP, PackedLinear

LANES = 16
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # the angle is a function of the position alone
SPARE = 1024  # positions behind the pages: a draft block may reach past the last committed token
PARTS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    *(f"self_attn.{name}_proj.packed" for name in "qkvo"),
    *(f"mlp.{name}_proj.packed" for name in ("gate", "up", "down")),
    *(f"self_attn.{name}_proj.bias" for name in "qkvo"),
)  # in the kernel's order; the window of the layer's attention comes last
OPTIONAL = ("self_attn.q_norm.weight", "self_attn.k_norm.weight", *PARTS[-4:])

Angles = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Cosines and sines [P, d] of positions [P], in the weights' dtype."""


@dataclass(frozen=True)
class Stack:
    """What the kernel reads beside a call's rows; it keeps every tensor alive whose address it holds."""

    parts: Tensor  # int64 [layers, len(PARTS) + 1]
    held: tuple[Tensor, ...]
    embedding_VD: Tensor
    norm_D: Tensor
    head: Tensor  # packed
    angles: Angles
    sizes: list[int]
    numbers: list[float]

    @classmethod
    def of(
        cls,
        layers: Sequence[nn.Module],
        embedding: nn.Module,
        norm: nn.Module,
        head: nn.Module,
        angles: Angles,
        *,
        heads: int,
        windows: Sequence[int],
        page_size: int,
        scale: float,
    ) -> Stack | None:
        """The stack of these modules; None where they are not what the kernel computes."""
        table = getattr(embedding, "weight", None)
        if not isinstance(table, Tensor) or type(head) is not PackedLinear or head.bias is not None:
            return None
        found = [_parts(layer, table.dtype) for layer in layers]
        kept = [parts for parts in found if parts is not None]
        if len(kept) < len(found) or not kept or table.dtype not in STEP or table.device.type != "cpu":
            return None
        attention, hidden = layers[0].get_submodule("self_attn"), table.shape[1]
        width, inner = (layers[0].get_submodule(f"{name}_proj").out_features for name in ("self_attn.q", "mlp.gate"))
        size = width // heads
        groups = attention.get_submodule("k_proj").out_features // size
        if size % (2 * LANES) or hidden % LANES or inner % LANES or width % heads:
            return None
        cos_Pd, _ = angles(torch.arange(1))
        if cos_Pd.shape != (1, size):
            return None
        rows = [
            [0 if part is None else part.data_ptr() for part in parts] + [window]
            for parts, window in zip(kept, windows, strict=True)
        ]
        held = tuple(part for parts in kept for part in parts if part is not None)
        sizes = [len(kept), hidden, heads, groups, size, inner, head.out_features, page_size]
        norm_D = norm.get_parameter("weight")
        return cls(torch.tensor(rows), held, table, norm_D, head.packed, angles, sizes, [_eps(norm), scale])


class Binding:
    """A stack's constants (`Constants` of decoder.h) over the pools it was last asked for, and what they point at."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._pool: weakref.ref[Tensor] | None = None  # the first: pools live and die together
        self._constants = torch.empty(0, dtype=torch.int64)
        self._shared: tuple[Tensor, ...] = ()

    def __call__(self, pools: Sequence[Tensor]) -> Tensor:
        """int64; `pools` are those of every layer's keys, then of every layer's values, [slots, heads, d] each."""
        if self._pool is None or self._pool() is not pools[0]:
            self._bind(pools)
        return self._constants

    def _bind(self, pools: Sequence[Tensor]) -> None:
        stack = self.stack
        cos_Pd, sin_Pd = (x.contiguous() for x in stack.angles(torch.arange(len(pools[0]) + SPARE)))
        self._shared = (stack.embedding_VD, stack.norm_D, stack.head, cos_Pd, sin_Pd)
        addresses = [x.data_ptr() for x in self._shared], [pool.data_ptr() for pool in pools]
        self._constants = torch.cat(
            [
                torch.tensor([*stack.sizes, stack.embedding_VD.element_size()]),
                torch.tensor(stack.numbers, dtype=torch.float64).view(torch.int64),
                torch.tensor([*addresses[0], len(cos_Pd), *addresses[1]]),
                stack.parts.flatten(),
            ]
        )
        self._pool = weakref.ref(pools[0])


def _parts(layer: nn.Module, dtype: torch.dtype) -> list[Tensor | None] | None:
    """The layer's tensors in the kernel's order, biases in float32; None where one is missing or of another kind."""
    if any(getattr(layer.get_submodule("mlp"), f"{name}_proj").bias is not None for name in ("gate", "up", "down")):
        return None
    parts: list[Tensor | None] = []
    for name in PARTS:
        part = _find(layer, name)
        if part is None and name not in OPTIONAL:
            return None
        if part is not None and (part.dtype != dtype or not part.is_contiguous()):
            return None
        parts.append(part.float() if part is not None and name.endswith(".bias") else part)
    return parts


def _find(layer: nn.Module, name: str) -> Tensor | None:
    found: object = layer
    for step in name.split("."):
        found = getattr(found, step, None)
    return found.detach() if isinstance(found, Tensor) else None


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def stack_of(
    model: PreTrainedModel, decoder: PreTrainedModel, *, page_size: int, calls: Sequence[tuple[float, int, float]]
) -> Stack | None:
    """The stack of a causal LM of `transformers`; `calls` are scale, window and softcap of each layer's attention."""
    config, layers = decoder.config, list(decoder.layers)
    kinds = {type(layer).__name__ for layer in layers}
    rope = getattr(decoder.rotary_emb, "rope_type", None) if hasattr(decoder, "rotary_emb") else None
    scales, softcaps = {scale for scale, _, _ in calls}, {softcap for _, _, softcap in calls}
    plain = len(kinds) == 1 and kinds <= set(LAYERS) and len(scales) == 1 and softcaps == {0.0}
    if not plain or rope not in FIXED_ROPES or config.hidden_act != "silu":
        return None
    embedding = model.get_input_embeddings()

    def angles(position_P: Tensor) -> tuple[Tensor, Tensor]:
        cos_1Pd, sin_1Pd = decoder.rotary_emb(embedding.weight[:1, None], position_P[None])
        return cos_1Pd[0], sin_1Pd[0]

    return Stack.of(
        layers,
        embedding,
        decoder.norm,
        model.get_output_embeddings(),
        angles,
        heads=config.num_attention_heads,
        windows=[window for _, window, _ in calls],
        page_size=page_size,
        scale=scales.pop(),
    )


class NativeDecoder:
    """`RaggedForward` of a target by the kernel."""

    def __init__(self, stack: Stack, taps: Sequence[int]) -> None:
        self.constants, self.taps = Binding(stack), list(taps)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(logits_BV,) or (logits_BV, taps_TkD) of `RaggedForward`'s arguments."""
        logits_BV, taps_TkD = torch.ops.dspark.decoder.default(*tensors[:7], self.constants(tensors[7:]), self.taps)
        return (logits_BV, taps_TkD) if self.taps else (logits_BV,)
