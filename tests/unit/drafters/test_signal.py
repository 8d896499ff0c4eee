"""Features say what their definitions say; blocks end where they are told to and cost nothing where nobody reads."""

from dataclasses import replace

import pytest
import torch
from drafting import PAGE, Greedy, context_of, pages_of, ragged, random_drafter

from dspark.drafters.signal import LARGEST, MOST, Signal, features


def test_features_by_their_definitions():
    logits_V = torch.tensor([2.0, 1.0, -1.0, float("-inf")])
    p_V = logits_V.softmax(-1)
    odds, margin, entropy = features(logits_V).tolist()
    assert odds == pytest.approx(float((p_V[0] / (1 - p_V[0])).log()), abs=1e-5)
    assert margin == pytest.approx(1.0, abs=1e-5)
    assert entropy == pytest.approx(-sum(float(p * p.log()) for p in p_V[:3]), abs=1e-5)
    assert LARGEST.confidence(features(logits_V)) == pytest.approx(float(p_V[0]), abs=1e-5)


def test_a_point_mass_has_numbers_too():
    assert features(torch.zeros(5).log().index_fill(0, torch.tensor([2]), 0.0)).tolist() == [MOST, MOST, 0.0]


def drafted(kind, **changes):
    fields = {"architectures": [kind], "num_hidden_layers": 1, "layer_types": ["full_attention"], "ttt_length": 5}
    drafter, _ = random_drafter(**(fields | {"enable_confidence_head": False, "markov_rank": 0}))
    drafter.allocate(33, PAGE)
    tokens, table_RP = [torch.arange(1, 7), torch.arange(9, 13)], pages_of([0, 0])
    drafter.extend(ragged(tokens, table_RP, [0, 0]), torch.randn(10, 64, generator=torch.Generator().manual_seed(3)))
    context = context_of([7, 13], [6, 4], table_RP, Greedy())
    return drafter.propose(replace(context, **changes)), drafter


def test_a_block_ends_where_it_is_told_to():
    asked = []

    def going_on(confidence_R):
        asked.append(confidence_R.tolist())
        return len(asked) < 3

    whole, _ = drafted("Qwen3Eagle3Model")
    draft, _ = drafted("Qwen3Eagle3Model", going_on=going_on)
    assert draft.token_RK.tolist() == whole.token_RK[:, :3].tolist()
    assert draft.length_R == [3, 3] and draft.probability_RKV.shape[1] == 3
    assert asked == whole.confidence_RK[:, :3].T.tolist()


@pytest.mark.parametrize("kind", ["Qwen3Eagle3Model", "Qwen3DSparkModel"])
def test_confidences_nobody_wants_are_not_made(kind):
    draft, drafter = drafted(kind, wanted=False)
    assert draft.feature_RKF is None and draft.confidence_RK.isnan().all()
    whole, _ = drafted(kind)
    assert torch.equal(whole.token_RK, draft.token_RK)
    drafter.signal = Signal(0.3, 0.5, 0.1, -0.2)
    assert whole.feature_RKF.shape == (2, 5, 3)
    expected = torch.sigmoid(whole.feature_RKF @ torch.tensor([0.5, 0.1, -0.2]) + 0.3)
    torch.testing.assert_close(drafter.signal.confidence(whole.feature_RKF), expected)
