"""Prompt lookup proposes what followed the longest, latest match, and nothing else."""

import torch
from drafting import context_of

from dspark.drafters.ngram import NGram, NoDraft


def proposed(*histories, slots=4, **options):
    table_RP = torch.zeros(len(histories), 1, dtype=torch.int32)
    anchors, positions = [h[-1] for h in histories], [len(h) - 1 for h in histories]
    context = context_of(anchors, positions, table_RP, None, slots, history=[list(h) for h in histories])
    return NGram(20, **options).propose(context)


def test_longest_then_latest_match():
    draft = proposed([1, 2, 3, 9, 7, 3, 8, 2, 3], [5, 6, 5, 7, 5], slots=2)
    assert draft.token_RK.tolist() == [[9, 7], [7, 5]]
    assert draft.length_R == [2, 2]
    assert draft.confidence_RK[0, 0] > draft.confidence_RK[1, 0]


def test_no_match_and_a_short_one():
    draft = proposed([1, 2, 3], [4, 4], [1])
    assert draft.length_R == [0, 1, 0]
    assert draft.token_RK[1, 0] == 4


def test_a_drafted_token_has_all_the_probability():
    draft = proposed([1, 2, 1])
    assert draft.probability_RKV.sum(-1).eq(1).all()
    assert draft.probability_RKV[0, 0, 2] == 1


def test_the_shortest_match_is_a_choice():
    assert proposed([1, 2, 1], shortest=2).length_R == [0]


def test_none_drafts_nothing():
    context = context_of([1, 2], [3, 4], torch.zeros(2, 1, dtype=torch.int32), None, 0)
    draft = NoDraft(20).propose(context)
    assert draft.token_RK.shape == (2, 0)
    assert draft.probability_RKV.shape == (2, 0, 20)
    assert draft.length_R == [0, 0]
