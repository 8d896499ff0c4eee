"""The decoder layer of a drafter: the target family's own block, with the attention passed in as a function.

... leading dimensions (T tokens, or B sequences × A anchors × K slots), D hidden size, H heads, G key/value heads,
d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dspark.common.errors import UserError
from dspark.ops.lean import gated, rms_norm, rotate

Rotary = tuple[Tensor, Tensor]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q_Hd, k_Gd, v_Gd) -> out_Hd: joins the layer's own keys and values with its context."""


@dataclass(frozen=True)
class Family:
    """What a target family's block does differently."""

    qk_norm: bool = False
    value_norm: bool = False  # values through a norm without weights
    sandwich: bool = False  # norms after attention and MLP too, and a scalar on the layer's output
    unit_scale: bool = False  # attention scores are not scaled
    scaled_embedding: bool = False  # embeddings × √D
    qkv_bias: bool | None = None  # None: the config's `attention_bias` decides
    output_bias: bool | None = None


GEMMA4 = Family(qk_norm=True, value_norm=True, sandwich=True, unit_scale=True, scaled_embedding=True)
FAMILIES = {
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True),
    "qwen2": Family(qkv_bias=True, output_bias=False),
    "llama": Family(),
    "mistral": Family(qkv_bias=False, output_bias=False),
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
}


@dataclass(frozen=True)
class BackboneConfig:
    """The shape of a drafting backbone. `model_type` names the family whose block it uses."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tap_count: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    key_is_value: bool = False  # Gemma 4: no v_proj, the values are the keys' projection
    logit_softcap: float = 0.0  # base logits through cap·tanh(x / cap), before the Markov bias
    windows: tuple[int, ...] = ()  # sliding window of each layer, 0 for full attention; () for all full
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0, "rope_type": "default"})
    max_position_embeddings: int = 32768

    @classmethod
    def of(cls, config: PreTrainedConfig, tap_count: int) -> BackboneConfig:
        """Read it from a flat drafter config, or from a target's. `model_type` must be one of FAMILIES."""
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        types = getattr(config, "layer_types", None) or ["full_attention"] * layers
        if len(types) < layers:
            raise UserError(f"layer_types names {len(types)} layers, num_hidden_layers is {layers}; make them agree")
        window = getattr(config, "sliding_window", None) or 0
        rope = dict(config.rope_parameters)
        if types[0] in rope:  # one rotary embedding for each type of layer
            if len(set(types[:layers])) > 1:
                raise UserError(f"layer_types {types[:layers]} mix rotary embeddings; a drafter has layers of one type")
            rope = dict(rope[types[0]])
        # Gemma 4's global layers have heads of another size; transformers resolves it layer by layer
        layer = getattr(config, "per_layer_config", None)
        layer = layer[0] if layer is not None else config
        return cls(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(layer, "num_key_value_heads", None) or heads,
            head_dim=getattr(layer, "head_dim", None) or config.hidden_size // heads,
            tap_count=tap_count,
            rms_norm_eps=config.rms_norm_eps,
            hidden_act=getattr(config, "hidden_act", None) or config.hidden_activation,
            attention_bias=bool(getattr(config, "attention_bias", False)),
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            key_is_value=bool(getattr(config, "attention_k_eq_v", False)) and types[0] == "full_attention",
            logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
            windows=tuple(window if kind == "sliding_attention" else 0 for kind in types[:layers]),
            rope=rope,
            max_position_embeddings=config.max_position_embeddings,
        )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def scale(self) -> float:
        return 1.0 if self.family.unit_scale else float(self.head_dim**-0.5)

    @property
    def embedding_scale(self) -> float:
        return float(self.hidden_size**0.5) if self.family.scaled_embedding else 1.0


class ScaleFreeNorm(nn.Module):
    """Root-mean-square norm without weights, reduced in float32."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self.eps)


class RMSNorm(ScaleFreeNorm):
    """With weights, rounded where the Hugging Face models round."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(eps)
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of absolute positions, for every rope type whose frequencies are fixed."""

    inverse_frequency: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        kind = config.rope.get("rope_type", "default")
        if kind == "default":
            exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
            frequency, self.scaling = 1.0 / (config.rope["rope_theta"] ** exponent), 1.0
        elif kind in ("linear", "llama3", "yarn", "proportional"):
            names = ("head_dim", "hidden_size", "num_attention_heads", "max_position_embeddings")
            shape = PreTrainedConfig(**{name: getattr(config, name) for name in names}, rope_parameters=config.rope)
            with torch.device("cpu"):  # a drafter may be under construction on the meta device
                frequency, self.scaling = ROPE_INIT_FUNCTIONS[kind](shape, torch.device("cpu"))
        else:
            raise UserError(
                f"rope_type {kind!r} depends on the sequence; use default, linear, llama3, yarn or proportional"
            )
        self.register_buffer("inverse_frequency", frequency, persistent=False)

    def forward(self, position: Tensor, dtype: torch.dtype) -> Rotary:
        """(cos, sin), each [..., 1, d], to be applied to every head."""
        angle = position[..., None, None].float() * self.inverse_frequency.float()
        cos, sin = ((half * self.scaling).to(dtype) for half in (angle.cos(), angle.sin()))
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


class Attention(nn.Module):
    """Projections of one layer. `width` is the input's: D, or 2·D in Eagle-3's first layer."""

    def __init__(self, config: BackboneConfig, width: int | None = None) -> None:
        super().__init__()
        family, hidden, size = config.family, width or config.hidden_size, config.head_dim
        bias = config.attention_bias if family.qkv_bias is None else family.qkv_bias
        out_bias = config.attention_bias if family.output_bias is None else family.output_bias
        self.head_dim = size
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=bias)
        if not config.key_is_value:
            self.v_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, config.hidden_size, bias=out_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if family.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if family.qk_norm else nn.Identity()
        self.v_norm = ScaleFreeNorm(config.rms_norm_eps) if family.value_norm else nn.Identity()
        self.key_is_value = config.key_is_value

    def query(self, x: Tensor, rotary: Rotary) -> Tensor:
        return rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), *rotary)

    def key_value(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values [..., G, d] of context features or of the block, by the same weights (DFlash)."""
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        value = key if self.key_is_value else self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.k_norm(key), *rotary), self.v_norm(value)


class MLP(nn.Module):
    """SwiGLU, or GeGLU where the config's activation says so."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.act, self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """A decoder layer whose attention sees what `attend` joins to the block's own keys and values."""

    layer_scalar: Tensor

    def __init__(self, config: BackboneConfig, index: int, width: int | None = None) -> None:
        super().__init__()
        self.index = index
        self.self_attn = Attention(config, width)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sandwich = config.family.sandwich
        if self.sandwich:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        normed = self.input_layernorm(x)
        key, value = self.self_attn.key_value(normed, rotary)
        return self.finish(x, attend(self.index, self.self_attn.query(normed, rotary), key, value))

    def finish(self, x: Tensor, mixed_Hd: Tensor) -> Tensor:
        """The layer's output from its residual input and what attention returned."""
        mixed = self.self_attn.o_proj(mixed_Hd.flatten(-2))
        if not self.sandwich:
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(mixed)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar
