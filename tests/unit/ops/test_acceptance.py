"""The rejection rule's formulas, exactly: accepted and corrected mass add up to the target's law."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.ops.acceptance import accept_probability, accepts, residual

weights = st.lists(st.sampled_from([0.0, 1e-6, 0.5, 1.0, 2.0, 7.0]), min_size=4, max_size=4).filter(any)


def law(weight: list[float]) -> torch.Tensor:
    w = torch.tensor([weight], dtype=torch.float64)
    return w / w.sum()


@settings(max_examples=200)
@given(weights, weights)
def test_accepted_and_corrected_mass_is_the_target_law(p_weight, q_weight):
    p, q = law(p_weight), law(q_weight)
    accept = torch.stack([accept_probability(p, q, torch.tensor([x])) for x in range(4)], 1)
    accepted = q * accept
    committed = accepted + (1 - accepted.sum()) * residual(p, q)
    assert torch.allclose(committed, p, atol=1e-14)
    assert torch.allclose(accepted.sum(), 1 - 0.5 * (p - q).abs().sum(), atol=1e-14)


@settings(max_examples=200)
@given(weights, weights, st.floats(1e-9, 1 - 1e-9))
def test_accepts_compares_with_the_accept_probability(p_weight, q_weight, u):
    p, q = law(p_weight), law(q_weight)
    for x in range(4):
        if q[0, x] > 0:
            chance = float(accept_probability(p, q, torch.tensor([x])))
            if abs(u - chance) > 1e-12:
                assert bool(accepts(p[0, x], q[0, x], torch.tensor(u, dtype=torch.float64))) == (u < chance)


def test_no_residual_mass_falls_back_to_the_target():
    p = torch.tensor([[0.25, 0.75]])
    assert torch.equal(residual(p, p), p)
    assert torch.equal(residual(p, p + 1e-6), p)
    assert torch.equal(residual(p, p * torch.nan), p)
