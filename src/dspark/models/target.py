"""Any Hugging Face decoder-only causal LM, run on one ragged batch over paged keys and values.

`transformers` defines and loads the model; ours is the attention function registered with it, the taps, and the
choice of the rows whose logits are computed. T tokens, B wanted rows, V vocabulary, D hidden size, k taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from dspark.common.errors import UserError
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph
from dspark.models.loading import load_causal_lm
from dspark.models.native import NativeDecoder, stack_of
from dspark.models.pages import KVPool
from dspark.models.taps import check_taps, decoder_of, tapping
from dspark.ops import attention as ops
from dspark.ops.linear import pack_linears

ATTENTION = "dspark_ragged"
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Paged:
    """What the registered attention function gets through the call's keyword arguments."""

    batch: Ragged
    pool: KVPool
    source_of_layer: Sequence[int]  # whose keys and values a layer reads: itself, unless the family shares them


@dataclass
class Probe:
    """Stands in for `Paged` once, at load: notes the shape of every layer's keys and values, and how it attends."""

    shapes: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    calls: dict[int, tuple[float, int, float]] = field(default_factory=dict)  # scale, window, softcap
    sinks: bool = False


def ragged_attention_forward(
    module: PreTrainedModel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: Paged | Probe | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it, on [1, heads, T, d]; context comes from the pages in `paged`."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    layer = module.layer_idx
    scale, window, cap = scaling if scaling is not None else q.shape[-1] ** -0.5, sliding_window or 0, softcap or 0.0
    if isinstance(paged, Probe):
        paged.shapes[layer] = (k.shape[1], k.shape[2], v.shape[2])
        paged.calls[layer] = (scale, window, cap)
        paged.sinks |= kwargs.get("s_aux") is not None
        return torch.zeros(1, q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device), None
    assert paged is not None, "the ragged attention function was called outside Target.forward"
    batch, source = paged.batch, paged.source_of_layer[layer]
    keys, values = paged.pool.keys[source], paged.pool.values[source]
    if source == layer:
        ops.store(k, v, keys, values, batch.slot_T)
    out = ops.ragged_attention(
        q,
        k,
        v,
        keys,
        values,
        batch.page_table_RP,
        batch.cu_query_R1,
        batch.context_R,
        paged.pool.page_size,
        scale,
        True,
        window,
        cap,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, ragged_attention_forward)


class Target:
    """A frozen causal LM whose every forward is prefill, decode and verification rows together."""

    def __init__(self, model: PreTrainedModel):
        """`model` was loaded with `attention=ATTENTION`. Raises UserError where its state cannot be rolled back."""
        self.model = model
        self.config = model.config.get_text_config()
        self.decoder = decoder_of(model)
        self.layer_count = len(self.decoder.layers)
        self.vocab_size: int = model.get_output_embeddings().out_features
        self.hidden_size: int = self.config.hidden_size
        self.context_limit: int = self.config.max_position_embeddings
        weight = model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        refuse_unpaged_layers(self.config)
        if pack_linears(model):
            let_go_of_files(model)
        self.kv_shapes, self.calls, self.source_of_layer = self._probe()
        self._graphs: dict[tuple[tuple[int, ...], int], SwappableGraph] = {}

    @staticmethod
    def load(
        source: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
    ) -> Target:
        """The causal LM of a directory or hub id as a target."""
        return Target(
            load_causal_lm(source, dtype=dtype, device=device, attention=ATTENTION, trust_remote_code=trust_remote_code)
        )

    @property
    def embedding_VD(self) -> Tensor:
        """The input embedding, shared with drafters."""
        return self.model.get_input_embeddings().weight

    @property
    def head(self) -> nn.Module:
        """The LM head as a module, [*, D] → [*, V], shared with drafters; family post-processing is not in it."""
        return self.model.get_output_embeddings()

    def allocate(self, pages: int, page_size: int) -> KVPool:
        """An empty pool for this model's keys and values."""
        return KVPool.empty(self.kv_shapes, pages, page_size, self.dtype, self.device)

    @torch.inference_mode()
    def forward(
        self, batch: Ragged, pool: KVPool, rows_B: Tensor, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Run T tokens, store their keys and values, return (logits_BV of the wanted rows, taps_TkD or None)."""
        outputs = self._graph(tuple(taps), pool.page_size)(*flatten(batch, rows_B, pool))
        return outputs[0], outputs[1] if taps else None

    def compile(self, taps: Sequence[int], page_size: int) -> SwappableGraph:
        """Compile the forward with these taps or load it from the cache; `forward` uses it once it is ready."""
        graph = self._graph(tuple(taps), page_size)
        if self.device.type == "cpu":
            graph.prepare(example_inputs(self.allocate(8, page_size)))
        return graph

    def _graph(self, taps: tuple[int, ...], page_size: int) -> SwappableGraph:
        if (taps, page_size) not in self._graphs:
            check_taps(taps, self.layer_count)
            forward = RaggedForward(self.model, taps, self.source_of_layer, page_size)
            identity = (
                f"{self.config.to_json_string(use_diff=False)} {self.layer_count} {self.dtype} {taps} {page_size}"
            )
            self._graphs[taps, page_size] = SwappableGraph(forward, identity, lambda: self._native(taps, page_size))
        return self._graphs[taps, page_size]

    def _native(self, taps: tuple[int, ...], page_size: int) -> NativeDecoder | None:
        """The forward by one kernel, where the layers are plain ones."""
        stack = stack_of(self.model, self.decoder, page_size=page_size, calls=self.calls)
        return None if stack is None else NativeDecoder(stack, taps)

    @torch.inference_mode()
    def _probe(self) -> tuple[list[tuple[int, int, int]], list[tuple[float, int, float]], list[int]]:
        """Key/value shapes and attention by layer, and whose pages each reads, from one forward of one token."""
        probe = Probe()
        token_11 = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.model(
            input_ids=token_11,
            position_ids=token_11,
            use_cache=False,
            paged=probe,
        )
        if probe.sinks:
            raise UserError(f"{self.config.model_type} uses attention sinks, which the paged attention does not have")
        for layer, module in enumerate(self.decoder.layers):
            if layer not in probe.shapes:
                mixer = next(iter(module.named_children()))[1]
                raise UserError(
                    f"layer {layer} of {self.config.model_type} ({type(mixer).__name__}) keeps a state that cannot be "
                    "rolled back; use a model with attention in every layer"
                )
        every = range(self.layer_count)
        return [probe.shapes[i] for i in every], [probe.calls[i] for i in every], self._sources()

    def _sources(self) -> list[int]:
        sources: list[int] = []
        last_of_type: dict[str | None, int] = {}
        types = getattr(self.config, "layer_types", None) or [None] * self.layer_count
        for layer, module in enumerate(self.decoder.layers):
            if getattr(getattr(module, "self_attn", None), "is_kv_shared_layer", False):
                sources.append(last_of_type[types[layer]])
            else:
                last_of_type[types[layer]] = layer
                sources.append(layer)
        return sources


class RaggedForward(nn.Module):
    """The forward as a function of flat tensors: (six of `Ragged`, wanted rows, keys…, values…) → logits, taps."""

    def __init__(self, model: nn.Module, taps: tuple[int, ...], source_of_layer: Sequence[int], page_size: int):
        super().__init__()
        self.model, self.taps, self.source_of_layer, self.page_size = model, taps, source_of_layer, page_size

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(logits_BV,) or (logits_BV, taps_TkD)."""
        batch, rows_B, pools = Ragged(*tensors[:6]), tensors[6], tensors[7:]
        half = len(pools) // 2
        pool = KVPool(list(pools[:half]), list(pools[half:]), pools[0].shape[0] // self.page_size, self.page_size)
        with tapping(self.model, self.taps) as seen:
            logits_1BV = self.model(
                input_ids=batch.token_T[None],
                position_ids=batch.position_T[None],
                use_cache=False,
                logits_to_keep=rows_B,
                paged=Paged(batch, pool, self.source_of_layer),
            ).logits
        if not self.taps:
            return (logits_1BV[0],)
        return logits_1BV[0], torch.cat([seen[tap][0] for tap in self.taps], dim=-1)


def flatten(batch: Ragged, rows_B: Tensor, pool: KVPool) -> tuple[Tensor, ...]:
    """The arguments of `RaggedForward`, in order."""
    return (
        batch.token_T,
        batch.position_T,
        batch.slot_T,
        batch.page_table_RP,
        batch.cu_query_R1,
        batch.context_R,
        rows_B,
        *pool.keys,
        *pool.values,
    )


def example_inputs(pool: KVPool) -> tuple[Tensor, ...]:
    """Two sequences of three tokens: what a graph is traced and checked with."""
    position_T = torch.tensor([0, 1, 2, 0, 1, 2])
    table_RP = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    slot_T = table_RP.repeat_interleave(3, dim=0)[torch.arange(6), position_T // pool.page_size] * pool.page_size
    batch = Ragged(
        torch.arange(6),
        position_T,
        slot_T + position_T % pool.page_size,
        table_RP,
        torch.tensor([0, 3, 6], dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
    )
    return flatten(batch, torch.tensor([1, 2, 5]), pool)


def let_go_of_files(model: nn.Module) -> None:
    """Copy the few tensors that were not packed: while one lies in the checkpoint's mapped file, all of it stays."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def refuse_unpaged_layers(config: PreTrainedConfig) -> None:
    """Raises UserError naming the first layer type whose keys and values cannot be rolled back by length."""
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in LAYER_TYPES:
            raise UserError(
                f"layer {layer} of {config.model_type} is {kind!r}, whose state cannot be rolled back; "
                f"use a model with only {' and '.join(LAYER_TYPES)} layers"
            )
