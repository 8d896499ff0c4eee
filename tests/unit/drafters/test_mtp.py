"""MTP over paged context drafts what its modules say of the whole text at once, whatever was rejected between."""

import pytest
import torch
from drafting import HIDDEN, PAGE, VOCABULARY, Greedy, context_of, drafter_fields, pages_of, ragged

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.drafters.config import parse
from dspark.drafters.mtp import MTP
from dspark.drafters.registry import load_drafter
from dspark.ops.step_attention import step_attention

MODULES = 3
FIELDS = {
    "architectures": ["Qwen3MTPModel"],
    "num_hidden_layers": MODULES,
    "num_nextn_predict_layers": MODULES,
    "layer_types": ["full_attention"] * MODULES,
    "target_layer_ids": [3],
}


@pytest.fixture
def drafter():
    torch.manual_seed(0)
    head = checkpoint.head_of(torch.randn(VOCABULARY, HIDDEN))
    drafter = checkpoint.build(parse(drafter_fields(**FIELDS), "config.json"), torch.randn(VOCABULARY, HIDDEN), head)
    for parameter in drafter.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    drafter.allocate(33, PAGE)
    return drafter.eval()


def text(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (length,), generator=generator), torch.randn(
        length, HIDDEN, generator=generator
    )


@torch.no_grad()
def expected(drafter, token_S, taps_SD):
    """The draft after all tokens, the last being the anchor, by dense passes over entries 0..S − 2."""
    tokens, hidden_ED = token_S.tolist(), taps_SD[: len(token_S) - 1]
    position_E = torch.arange(len(hidden_ED))
    for depth in range(1, MODULES + 1):

        def attend(_layer, *qkv):
            return step_attention(*(x[None] for x in qkv), drafter.config.scale)[0]

        module = drafter.module(depth)
        embedding_ED = drafter.embed(torch.tensor(tokens[depth:]))
        hidden_ED = module.join(embedding_ED, hidden_ED, drafter.rotary(position_E, hidden_ED.dtype), attend)
        tokens.append(int(drafter.slot_logits(module.shared_head.norm(hidden_ED[-1])).argmax()))
    return tokens[len(token_S) :]


def test_rounds_with_rejected_drafts_between_them(drafter):
    rows = [text(14, 1), text(11, 2)]
    table_RP = pages_of([0, 0])

    def proposed(lengths):
        anchors = [int(token_S[n - 1]) for (token_S, _), n in zip(rows, lengths, strict=True)]
        context = context_of(anchors, [n - 1 for n in lengths], table_RP, Greedy(), slots=MODULES)
        return drafter.propose(context).token_RK.tolist()

    def commit(starts, ends, rejected=0):
        """Rows start..end of the text, and rows of tokens that were drafted and rejected after them."""
        wrong = torch.full((rejected,), 7)
        tokens = [torch.cat((token_S[s:e], wrong)) for (token_S, _), s, e in zip(rows, starts, ends, strict=True)]
        noise = torch.full((rejected, HIDDEN), 9.0)
        taps = [torch.cat((taps_SD[s:e], noise)) for (_, taps_SD), s, e in zip(rows, starts, ends, strict=True)]
        drafter.extend(ragged(tokens, table_RP, starts), torch.cat(taps))

    def dense(lengths):
        return [expected(drafter, t[:n], taps) for (t, taps), n in zip(rows, lengths, strict=True)]

    commit([0, 0], [6, 1])  # the second request is shorter than the deepest module looks back
    assert proposed([7, 2]) == dense([7, 2])
    commit([6, 1], [7, 2], rejected=3)
    assert proposed([8, 3]) == dense([8, 3])
    commit([7, 2], [10, 5], rejected=1)
    assert proposed([11, 6]) == dense([11, 6])
    commit([10, 5], [11, 9])
    assert proposed([12, 10]) == dense([12, 10])


def test_chunks_of_a_prompt_are_joined(drafter):
    token_S, taps_SD = text(12, 3)
    table_RP = pages_of([0])
    for start, end in ((0, 1), (1, 2), (2, 7), (7, 11)):
        drafter.extend(ragged([token_S[start:end]], table_RP, [start]), taps_SD[start:end])
    for slots in (1, MODULES):
        draft = drafter.propose(context_of([int(token_S[-1])], [11], table_RP, Greedy(), slots=slots))
        assert draft.token_RK[0].tolist() == expected(drafter, token_S, taps_SD)[:slots]
    assert ((draft.confidence_RK > 0) & (draft.confidence_RK <= 1)).all()


def test_saved_and_loaded_beside_a_target(drafter, target, tmp_path):
    config = parse(drafter_fields(**FIELDS), "config.json")
    checkpoint.save(drafter, config, tmp_path / "d", frozen=False)
    loaded = load_drafter(tmp_path / "d", target, block_size=2)
    assert isinstance(loaded, MTP)
    assert (loaded.block_size, loaded.taps) == (2, (3,))
    checkpoint.save(drafter, config, tmp_path / "whole")
    again, read = checkpoint.load(tmp_path / "whole")
    assert read == config
    assert all(torch.equal(tensor, drafter.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_layer_ids": [1, 3]}, ("2 layers", "mtp reads 1")),
        ({"num_nextn_predict_layers": 2}, ("is 3", "2")),
        ({"num_nextn_predict_layers": 0}, ("0", "1 or more")),
    ],
)
def test_a_config_that_contradicts_itself(change, words):
    with pytest.raises(UserError) as caught:
        parse(drafter_fields(**FIELDS) | change, "config.json")
    assert all(word in str(caught.value) for word in words), caught.value
