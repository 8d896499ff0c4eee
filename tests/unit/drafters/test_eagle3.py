"""Eagle-3 over paged context drafts what its dense chain does, round after round, whatever was rejected between."""

import pytest
import torch
from drafting import HIDDEN, PAGE, VOCABULARY, Greedy, context_of, drafter_fields, pages_of, ragged

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.drafters.config import parse
from dspark.drafters.eagle3 import Eagle3
from dspark.drafters.pruned import most_frequent
from dspark.drafters.registry import load_drafter

FIELDS = {
    "architectures": ["Qwen3Eagle3Model"],
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "ttt_length": 5,
}


def made(**changes):
    torch.manual_seed(0)
    config = parse(drafter_fields(**FIELDS) | changes, "config.json")
    head = checkpoint.head_of(torch.randn(VOCABULARY, HIDDEN))
    drafter = checkpoint.build(config, torch.randn(VOCABULARY, HIDDEN), head).eval()
    for parameter in drafter.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    drafter.allocate(33, PAGE)
    return drafter, config


@pytest.fixture
def drafter():
    return made()[0]


def text(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (length,), generator=generator), torch.randn(length, 2 * HIDDEN)


def expected(drafter, token_S, taps_SD):
    """The dense chain after all tokens; the last is the anchor, whose feature does not exist yet."""
    return drafter.chain(taps_SD[None, : len(token_S) - 1], token_S[None, 1:], 5).token[0].tolist()


def test_rounds_with_rejected_drafts_between_them(drafter):
    rows = [text(12, 1), text(9, 2)]
    table_RP = pages_of([0, 0])

    def proposed(lengths):
        anchors = [int(token_S[n - 1]) for (token_S, _), n in zip(rows, lengths, strict=True)]
        return drafter.propose(context_of(anchors, [n - 1 for n in lengths], table_RP, Greedy())).token_RK.tolist()

    def commit(starts, ends):
        tokens = [token_S[s:e] for (token_S, _), s, e in zip(rows, starts, ends, strict=True)]
        taps = torch.cat([taps_SD[s:e] for (_, taps_SD), s, e in zip(rows, starts, ends, strict=True)])
        drafter.extend(ragged(tokens, table_RP, starts), taps)

    def dense(lengths):
        return [expected(drafter, t[:n], taps) for (t, taps), n in zip(rows, lengths, strict=True)]

    commit([0, 0], [5, 1])
    assert proposed([6, 2]) == dense([6, 2])
    commit([5, 1], [6, 4])  # what was drafted past the anchor is overwritten before it is read
    assert proposed([7, 5]) == dense([7, 5])
    commit([6, 4], [11, 8])
    assert proposed([12, 9]) == dense([12, 9])


def test_chunks_of_a_prompt_are_joined(drafter):
    token_S, taps_SD = text(12, 3)
    table_RP = pages_of([0])
    for start in range(0, 11, 3):
        end = min(start + 3, 11)
        drafter.extend(ragged([token_S[start:end]], table_RP, [start]), taps_SD[start:end])
    draft = drafter.propose(context_of([int(token_S[-1])], [11], table_RP, Greedy()))
    assert draft.token_RK[0].tolist() == expected(drafter, token_S, taps_SD)
    assert ((draft.confidence_RK > 0) & (draft.confidence_RK <= 1)).all()


def test_loaded_beside_a_target(drafter, target, tmp_path):
    config = parse(drafter_fields(**FIELDS), "config.json")
    checkpoint.save(drafter, config, tmp_path / "d")
    loaded = load_drafter(tmp_path / "d", target, block_size=3)
    assert isinstance(loaded, Eagle3)
    loaded.allocate(9, PAGE)
    token_S, taps_SD = text(4, 5)
    loaded.extend(ragged([token_S[:3]], pages_of([0], width=8), [0]), taps_SD[:3])
    draft = loaded.propose(context_of([int(token_S[3])], [3], pages_of([0], width=8), Greedy(), slots=3))
    assert draft.token_RK.shape == (1, 3)


def test_a_pruned_vocabulary_is_drafted_from_alone(target, tmp_path):
    drafter, config = made(draft_vocab_size=20)
    count_V = torch.randint(0, 9, (VOCABULARY,))
    ids_U = drafter.adopt(most_frequent(count_V, 20))
    assert count_V[ids_U].min() >= count_V[~drafter.t2d].max()
    checkpoint.save(drafter, config, tmp_path / "d", dtype=torch.bfloat16, frozen=False)
    loaded = load_drafter(tmp_path / "d", target)
    assert (loaded.d2t.dtype, loaded.t2d.dtype, int(loaded.t2d.sum())) == (torch.int64, torch.bool, 20)
    loaded.allocate(33, PAGE)
    token_S, taps_SD = text(6, 4)
    loaded.extend(ragged([token_S[:5]], pages_of([0]), [0]), taps_SD[:5])
    sampler = Greedy()
    draft = loaded.propose(context_of([int(token_S[5])], [5], pages_of([0]), sampler))
    for logits_1V, token_1 in zip(sampler.seen, draft.token_RK[0], strict=True):
        assert torch.equal(logits_1V[0].isfinite(), loaded.t2d)
        assert loaded.t2d[token_1]


def test_a_draft_vocabulary_larger_than_the_targets():
    with pytest.raises(UserError, match=rf"{VOCABULARY + 1} exceeds the vocabulary of {VOCABULARY}"):
        parse(drafter_fields(**FIELDS) | {"draft_vocab_size": VOCABULARY + 1}, "config.json")
