"""Drafting over paged context equals the dense training pass, and no request sees another."""

from dataclasses import replace

import pytest
import torch
from drafting import HIDDEN, PAGE, VOCABULARY, Greedy, context_of, pages_of, ragged, random_drafter

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.lesson import Lesson
from dspark.ops.draws import Draws
from dspark.ops.sampling import Shaping

KINDS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "confidence of hidden alone": {"confidence_head_with_markov": False},
    "dflash": {"markov_rank": 0, "enable_confidence_head": False},
    "anchor and masks": {"sample_from_anchor": False},
    "dflash, anchor and masks": {"markov_rank": 0, "enable_confidence_head": False, "sample_from_anchor": False},
    "llama block": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
}
LENGTHS = [9, 1, 14]


def committed(seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, VOCABULARY, (n + 1,), generator=generator) for n in LENGTHS]  # anchor last
    taps = [torch.randn(n, 2 * HIDDEN, generator=generator) for n in LENGTHS]
    return tokens, taps


def drafted(drafter, rows, chunk=100, slots=5):
    """Extend the chosen requests' context in chunks, then propose."""
    tokens, taps = committed()
    table_RP = pages_of(LENGTHS)[rows]
    drafter.allocate(len(LENGTHS) * 16 + 1, PAGE)
    for start in range(0, max(LENGTHS), chunk):
        parts = [tokens[r][:-1][start : start + chunk] for r in rows]
        features = torch.cat([taps[r][start : start + chunk] for r in rows])
        drafter.extend(ragged(parts, table_RP, [start] * len(rows)), features)
    sampler = Greedy()
    draft = drafter.propose(
        context_of([tokens[r][-1] for r in rows], [LENGTHS[r] for r in rows], table_RP, sampler, slots)
    )
    return draft, torch.stack(sampler.seen, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_paged_batch_equals_the_training_pass_of_each_request(kind):
    drafter, _ = random_drafter(**KINDS[kind])
    draft, logits_RKV = drafted(drafter, [0, 1, 2])
    tokens, taps = committed()
    for r, length in enumerate(LENGTHS):
        known = torch.cat([tokens[r], draft.token_RK[r]])[None]  # teacher forcing on the drafted tokens
        features = torch.cat([taps[r], torch.full((known.shape[1] - length, 2 * HIDDEN), 1e3)])[None]
        with torch.no_grad():
            blocks = drafter(Lesson.of(known, features, torch.tensor([[length]])))
            dense_BAKV = drafter.slot_logits(blocks.hidden_BAKD, blocks.latent_BAKr)
        torch.testing.assert_close(logits_RKV[r], dense_BAKV[0, 0], rtol=1e-4, atol=1e-4)
        if blocks.confidence_BAK is not None:
            confidence_K = blocks.confidence_BAK[0, 0].sigmoid()
            torch.testing.assert_close(draft.confidence_RK[r], confidence_K, rtol=1e-4, atol=1e-5)


def test_a_request_drafts_the_same_alone_and_in_company_and_chunk_by_chunk():
    drafter, _ = random_drafter()
    together, _ = drafted(drafter, [0, 1, 2])
    for r in range(3):
        alone, _ = drafted(drafter, [r], chunk=2)
        assert torch.equal(alone.token_RK[0], together.token_RK[r])
        torch.testing.assert_close(alone.confidence_RK[0], together.confidence_RK[r])


def test_fewer_slots_than_the_block_size():
    drafter, _ = random_drafter()
    draft, _ = drafted(drafter, [0, 2], slots=2)
    assert draft.token_RK.shape == (2, 2)
    assert draft.length_R == [2, 2]


def test_context_rolled_back_and_overwritten_leaves_no_trace():
    drafter, _ = random_drafter()
    expected, _ = drafted(drafter, [0])
    tokens, taps = committed()
    table_RP = pages_of(LENGTHS)[[0]]
    wrong = torch.randn(6, 2 * HIDDEN)
    drafter.extend(ragged([torch.zeros(6, dtype=torch.long)], table_RP, [7]), wrong)  # positions 7..12, then rejected
    drafter.extend(ragged([tokens[0][7:9]], table_RP, [7]), taps[0][7:9])
    again = drafter.propose(context_of([tokens[0][-1]], [9], table_RP, Greedy()))
    assert torch.equal(again.token_RK, expected.token_RK)


def test_the_restricted_head_draws_from_exactly_the_largest_base_logits():
    drafter, _ = random_drafter()
    _, full_RKV = drafted(drafter, [0, 1, 2])
    base = []
    handle = drafter.body.lm_head.register_forward_hook(lambda *call: base.append(call[-1]))
    drafter.markov_top_k = 7
    _, few_RKV = drafted(drafter, [0, 1, 2])
    handle.remove()
    kept = few_RKV > float("-inf")
    assert (kept.sum(-1) == 7).all()
    assert torch.equal(
        kept[:, 0].nonzero()[:, 1].view(3, 7), base[0].unflatten(0, (3, -1))[:, 0].topk(7).indices.sort().values
    )
    torch.testing.assert_close(few_RKV[:, 0][kept[:, 0]], full_RKV[:, 0][kept[:, 0]], rtol=1e-4, atol=1e-4)


def test_confidence_of_a_slot_sees_only_tokens_before_it():
    class Forced(Greedy):
        def __init__(self, tokens):
            super().__init__()
            self.tokens = tokens

        def draw(self, logits_RV, slot):
            _, law_RV = super().draw(logits_RV, slot)
            return torch.tensor([self.tokens[slot]]), law_RV

    for kind in KINDS.values():
        drafter, _ = random_drafter(**kind)
        drafted(drafter, [0])
        table_RP = pages_of(LENGTHS)[[0]]
        one = drafter.propose(context_of([3], [9], table_RP, Forced([1, 2, 3, 4, 5])))
        two = drafter.propose(context_of([3], [9], table_RP, Forced([1, 2, 30, 40, 50])))
        assert torch.equal(one.confidence_RK[0, :3], two.confidence_RK[0, :3])


@pytest.mark.parametrize("kind", ["vanilla", "confidence of hidden alone"])
@pytest.mark.parametrize("top_k", [0, 7])
def test_the_kernel_of_the_sequential_head_drafts_what_the_sampler_would(kind, top_k):
    drafter, _ = random_drafter(**KINDS[kind])
    drafter.markov_top_k = top_k
    drafted(drafter, [0, 1, 2])
    tokens, _ = committed()
    anchors, table_RP = [row[-1] for row in tokens], pages_of(LENGTHS)
    one = drafter.propose(context_of(anchors, LENGTHS, table_RP, Greedy()))
    context = context_of(anchors, LENGTHS, table_RP, None)
    two = drafter.propose(
        replace(
            context,
            draws=Draws(Shaping.of([SamplingParams(temperature=0)] * 3).knobs_R4, torch.full((3, 5), 0.5).double()),
        )
    )
    assert torch.equal(one.token_RK, two.token_RK)
    torch.testing.assert_close(one.confidence_RK, two.confidence_RK, rtol=1e-4, atol=1e-5)
