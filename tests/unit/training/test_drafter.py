"""How an untrained drafter starts."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.common.errors import UserError
from dspark.training.config import DrafterShape
from dspark.training.drafter import create

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    shape = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **HEADS, initializer_range=0.3)).requires_grad_(False)


def test_stitched_context_is_the_targets_where_all_taps_agree(target):
    drafter, config = create(target, DrafterShape(layers=2, taps=(1, 3), markov_rank=4), anchors=4, seed=0)
    assert config.num_target_layers == 5
    hidden_TD, position_T = torch.randn(6, 16), torch.arange(6)
    layer, norm = target.model.layers[4], drafter.body.backbone.hidden_norm
    norm.weight.data.copy_(layer.input_layernorm.weight)  # the mean of both copies', were they alike
    _, (_, value_TGd) = drafter.body.backbone.project(hidden_TD.repeat(1, 2), position_T)
    expected = layer.self_attn.v_proj(layer.input_layernorm(hidden_TD))
    torch.testing.assert_close(value_TGd.flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_frozen_parts_are_the_targets_and_the_rest_learns(target):
    drafter, _ = create(target, DrafterShape(layers=1, taps=(2,), markov_rank=4), anchors=4, seed=0)
    assert drafter.body.lm_head is target.lm_head
    frozen = {name for name, parameter in drafter.named_parameters() if not parameter.requires_grad}
    assert frozen == {"body.embed_tokens.weight", "body.lm_head.weight"}


def test_the_seed_decides(target):
    shape = DrafterShape(layers=1, taps=(2,), markov_rank=4)
    one, two, other = (create(target, shape, anchors=4, seed=s, start="random")[0].state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_layers_of_another_shape_cannot_be_copied(target):
    with pytest.raises(UserError, match="start: random"):
        create(target, DrafterShape(layers=1, taps=(2,), intermediate_size=40), anchors=4, seed=0)
