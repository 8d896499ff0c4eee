"""A draft model proposes its own greedy continuation, whatever was drafted and rejected before."""

import pytest
import torch
from drafting import PAGE, VOCABULARY, Greedy, context_of, pages_of, ragged

from dspark.drafters.draft_model import DraftModel, fit_vocabulary


@pytest.fixture
def drafter(target):
    drafter = DraftModel(target, VOCABULARY)
    drafter.allocate(33, PAGE)
    return drafter


@torch.no_grad()
def continuation(target, tokens, steps):
    """Greedy tokens of the library's own model, cache-free."""
    model = target.model
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    for _ in range(steps):
        tokens = [*tokens, int(model(torch.tensor([tokens])).logits[0, -1].argmax())]
    model.set_attn_implementation(implementation)
    return tokens[-steps:]


def test_rounds_after_rejection_and_acceptance(target, drafter):
    one, two = [5, 9, 2, 44, 7], [8, 1]
    table_RP = pages_of([0, 0])
    drafter.extend(ragged([one[:-1], two[:-1]], table_RP, [0, 0]), None)
    draft = drafter.propose(context_of([one[-1], two[-1]], [4, 1], table_RP, Greedy()))
    assert draft.token_RK.tolist() == [continuation(target, one, 5), continuation(target, two, 5)]

    accepted = draft.token_RK.tolist()
    one_next, two_next = [*one, *accepted[0][:2], 13], [*two, 30]  # two accepted and corrected; all rejected
    drafter.extend(ragged([one_next[4:-1], two_next[1:-1]], table_RP, [4, 1]), None)
    draft = drafter.propose(context_of([13, 30], [7, 2], table_RP, Greedy()))
    assert draft.token_RK.tolist() == [continuation(target, one_next, 5), continuation(target, two_next, 5)]


def test_drafting_past_the_last_page_leaves_the_request_alone(target, drafter):
    tokens = [5, 9, 2, 44, 7, 3, 21, 8]
    table_RP = pages_of([0], width=2)  # room for 8 tokens
    drafter.extend(ragged([tokens[:-1]], table_RP, [0]), None)
    drafter.propose(context_of([tokens[-1]], [7], table_RP, Greedy()))
    draft = drafter.propose(context_of([tokens[-1]], [7], table_RP, Greedy(), slots=1))
    assert draft.token_RK[0].tolist() == continuation(target, tokens, 1)


def test_padding_of_the_vocabulary():
    logits_RV = torch.ones(2, 5)
    assert fit_vocabulary(logits_RV, 3).shape == (2, 3)
    assert fit_vocabulary(logits_RV, 7)[0].tolist() == [1, 1, 1, 1, 1, float("-inf"), float("-inf")]
