"""The target's first layers draft on the target's own pages as they do on pages of their own."""

import pytest
import torch
from drafting import HIDDEN, LAYERS, PAGE, VOCABULARY, Greedy, context_of, drafter_fields, pages_of, ragged
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.drafters.config import parse
from dspark.drafters.layer_skip import LayerSkip
from dspark.drafters.registry import load_drafter
from dspark.models.taps import features
from dspark.models.target import ATTENTION, Target
from dspark.models.truncated import truncated

FIELDS = {"architectures": ["LayerSkipModel"], "block_size": 4, "target_layer_ids": [1]}


@pytest.fixture
def directory(tmp_path):
    config = parse(drafter_fields(**FIELDS), "config.json")
    torch.manual_seed(3)
    head = checkpoint.build(
        config, torch.zeros(VOCABULARY, HIDDEN), checkpoint.head_of(torch.zeros(VOCABULARY, HIDDEN))
    )
    torch.nn.init.normal_(head.norm.weight, 1.0, 0.2)
    checkpoint.save(head, config, tmp_path / "exit", frozen=False)
    return tmp_path / "exit"


@torch.no_grad()
def continuation(target, norm, tokens, steps):
    """Greedy tokens of the exit layer, from the library's own forward over the whole text."""
    model = target.model
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    for _ in range(steps):
        taps_1TD, _ = features(model, torch.tensor([tokens]), (1,))
        tokens = [*tokens, int(model.lm_head(norm(taps_1TD[0, -1])).argmax())]
    model.set_attn_implementation(implementation)
    return tokens[-steps:]


@pytest.mark.parametrize("shared", [True, False])
def test_rounds_with_rejected_drafts_between_them(target, directory, shared):
    drafter = load_drafter(directory, target)
    assert isinstance(drafter, LayerSkip)
    assert (drafter.taps, drafter.block_size) == ((), 4)
    pool, norm = target.allocate(33, PAGE), drafter.model.decoder.norm
    drafter.share(pool) if shared else drafter.allocate(33, PAGE)
    table_RP = pages_of([0, 0])

    def commit(texts, starts):
        batch = ragged([tokens[s:] for tokens, s in zip(texts, starts, strict=True)], table_RP, starts)
        target.forward(batch, pool, torch.zeros(1, dtype=torch.long))
        drafter.extend(batch, None)

    def proposed(texts):
        anchors = [tokens[-1] for tokens in texts]
        draft = drafter.propose(context_of(anchors, [len(t) - 1 for t in texts], table_RP, Greedy(), slots=4))
        return draft.token_RK.tolist()

    one, two = [5, 9, 2, 44, 7], [8, 1]
    commit([one[:-1], two[:-1]], [0, 0])
    assert proposed([one, two]) == [continuation(target, norm, one, 4), continuation(target, norm, two, 4)]
    one_next, two_next = [*one, 3, 13], [*two, 30]
    commit([[*one, 3, 60, 60], [*two, 60, 60, 60]], [4, 1])  # rejected drafts come along
    wanted = [continuation(target, norm, one_next, 4), continuation(target, norm, two_next, 4)]
    assert proposed([one_next, two_next]) == wanted


def test_the_target_is_not_changed(target, directory):
    before = {name: tensor.data_ptr() for name, tensor in target.model.state_dict().items()}
    drafter = load_drafter(directory, target)
    assert len(drafter.model.decoder.layers) == 2
    assert len(target.decoder.layers) == LAYERS
    assert {name: tensor.data_ptr() for name, tensor in target.model.state_dict().items()} == before
    assert drafter.model.kv_shapes == target.kv_shapes[:2]


FAMILIES = ["qwen2", "llama", "mistral", "gemma3_text", "olmo2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_familys_first_layers(family):
    shape = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape, **heads)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    first = Target(truncated(model, 4, model.get_decoder().norm))  # all layers: the model itself
    whole = Target(model)
    batch = ragged([[3, 4, 5, 6, 7]], pages_of([0]), [0])
    rows = torch.arange(5)
    found, _ = first.forward(batch, first.allocate(33, PAGE), rows)
    wanted, _ = whole.forward(batch, whole.allocate(33, PAGE), rows)
    assert torch.equal(found, wanted)
    two = Target(truncated(model, 2, model.get_decoder().norm))
    _, taps = whole.forward(batch, whole.allocate(33, PAGE), rows, taps=(1,))
    shallow, _ = two.forward(batch, two.allocate(33, PAGE), rows)
    assert not torch.allclose(shallow, wanted)
    torch.testing.assert_close(shallow, model.lm_head(model.get_decoder().norm(taps)), rtol=1e-4, atol=1e-4)


def test_an_exit_past_the_targets_layers(target, tmp_path):
    config = parse(drafter_fields(**FIELDS) | {"target_layer_ids": [LAYERS]}, "config.json")
    built = checkpoint.build(config, torch.zeros(1, 1), checkpoint.head_of(torch.zeros(VOCABULARY, HIDDEN)))
    checkpoint.save(built, config, tmp_path / "past", frozen=False)
    with pytest.raises(UserError, match=rf"layer {LAYERS}, .*0\.\.{LAYERS - 1}"):
        load_drafter(tmp_path / "past", target)
    with pytest.raises(UserError, match=r"\[-1\]"):
        parse(drafter_fields(**FIELDS) | {"target_layer_ids": [-1]}, "config.json")
