"""The three losses: weights over slots, and what is measured beside them."""

import torch

from dspark.drafters.body import BlockLogits
from dspark.training.objectives import Weights, objective


def example():
    torch.manual_seed(0)
    draft, target = torch.randn(2, 3, 4, 11), torch.randn(2, 3, 4, 11)
    label, mask = torch.randint(0, 11, (2, 3, 4)), torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 1, 2:] = False
    return BlockLogits(draft, torch.randn(2, 3, 4)), target, label, mask


def test_weights_fall_with_the_slot():
    blocks, target, label, mask = example()
    mask[:] = False
    mask[0, 0, 0] = mask[0, 0, 3] = True
    got = objective(blocks, target, label, mask, Weights(decay=3.0, cross_entropy=1.0, l1=0.0, confidence=0.0))
    each = -blocks.draft[0, 0].log_softmax(-1).gather(-1, label[0, 0][:, None])[:, 0]
    late = torch.exp(torch.tensor(-1.0))
    torch.testing.assert_close(got.total, (each[0] + late * each[3]) / (1 + late))


def test_a_perfect_drafter_is_accepted_everywhere():
    _, target, label, mask = example()
    got = objective(BlockLogits(target, None), target, label, mask, Weights())
    torch.testing.assert_close(got.acceptance_BAK, torch.ones(2, 3, 4))
    assert got.l1 < 1e-6 and got.confidence == 0


def test_slots_that_do_not_count_change_nothing():
    blocks, target, label, mask = example()
    first = objective(blocks, target, label, mask, Weights())
    blocks.draft[0, 1, 2:] += 7
    blocks.confidence[0, 1, 2:] -= 7
    second = objective(blocks, target, label, mask, Weights())
    assert first.total == second.total
