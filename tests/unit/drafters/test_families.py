"""A drafter's layer is the target family's own: without context it equals the library's, run over the block alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dspark.drafters.backbone import Backbone
from dspark.drafters.body import softcapped
from dspark.drafters.config import parse
from dspark.drafters.layers import BackboneConfig
from dspark.drafters.lesson import Lesson

SHAPE = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 8,
    "layer_types": ["full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "all",
    "num_global_key_value_heads": 1,
    "final_logit_softcapping": 5.0,
}
FAMILIES = {
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "qwen2": {"model_type": "qwen2"},
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
    "gemma4": {"model_type": "gemma4_text", **GEMMA4},
    "gemma4, keys are values": {"model_type": "gemma4_text", "attention_k_eq_v": True, **GEMMA4},
    "gemma4 unified": {"model_type": "gemma4_unified_text", "attention_k_eq_v": True, **GEMMA4},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers(name):
    torch.manual_seed(0)
    fields = {**SHAPE, **FAMILIES[name]}
    config = AutoConfig.for_model(**fields, attn_implementation="eager")
    model = AutoModel.from_config(config).eval()
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor, mean=1.0 if tensor.dim() == 1 else 0.0, std=0.2)
    own = BackboneConfig.of(config, tap_count=1)
    backbone = Backbone(own).eval()
    wanted = {k for k in backbone.state_dict() if not k.startswith(("fc", "hidden_norm"))}
    state = {k: v for k, v in model.state_dict().items() if k in wanted}
    assert set(state) == wanted
    backbone.load_state_dict(state, strict=False)

    inputs_1TD = torch.randn(1, 6, 32)
    with torch.no_grad():
        mask = torch.zeros(1, 1, 6, 6)  # all see all
        expected = model(inputs_embeds=inputs_1TD, attention_mask=mask, use_cache=False).last_hidden_state
        zero_11 = torch.zeros(1, 1, dtype=torch.long)
        unseen_1SD = torch.zeros(1, 1, 32)  # context at 0 is none for an anchor at 0
        block = backbone.blocks(inputs_1TD[:, None], Lesson.of(zero_11, unseen_1SD, zero_11))
    torch.testing.assert_close(block[0, 0], expected[0], rtol=1e-4, atol=1e-4)


def test_gemma4_embeddings_and_logits():
    config = AutoConfig.for_model(**{**SHAPE, **FAMILIES["gemma4"]})
    own = BackboneConfig.of(config, tap_count=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    token_1T = torch.tensor([[3, 4, 36]])
    embedded = model.get_input_embeddings()(token_1T)
    torch.testing.assert_close(model.get_input_embeddings().weight[token_1T] * own.embedding_scale, embedded)
    with torch.no_grad():
        hidden = model.model(token_1T).last_hidden_state
        torch.testing.assert_close(softcapped(model.lm_head(hidden), own.logit_softcap), model(token_1T).logits)


def test_a_gemma4_drafter_config():
    fields = AutoConfig.for_model(**{**SHAPE, **FAMILIES["gemma4"]}).to_dict()
    drafter = {"block_size": 5, "mask_token_id": 4, "target_layer_ids": [1], "markov_rank": 4}
    raw = {**fields, **drafter, "enable_confidence_head": False, "architectures": ["Gemma4DSparkModel"]}
    own = parse(raw, "config.json").backbone
    assert (own.head_dim, own.num_key_value_heads, own.scale, own.logit_softcap) == (8, 2, 1.0, 5.0)
