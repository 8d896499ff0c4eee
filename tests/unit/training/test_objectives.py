"""The objective of a batch: weights over slots, slots that do not count, and what is measured beside it."""

from dataclasses import dataclass

import pytest
import torch

from dspark.common.errors import UserError
from dspark.drafters.lesson import Blocks
from dspark.ops.losses import confidence_loss, slot_losses, weighted_mean
from dspark.training.objectives import Teacher, Weights, objective

B, A, K, D, V = 2, 3, 4, 5, 11


@dataclass
class Linear:
    """The part of a drafter that the objective sees: a head of its own."""

    head_VD: torch.Tensor
    draft_ids: torch.Tensor | None = None

    def slot_logits(self, hidden_ND, latent_Nr):
        return hidden_ND @ self.head_VD.T

    def parameters(self):
        return iter([self.head_VD])


def example(draft_vocabulary=V):
    torch.manual_seed(0)
    drafter = Linear(torch.randn(draft_vocabulary, D, requires_grad=True))
    blocks = Blocks(torch.randn(B, A, K, D, requires_grad=True), None, torch.randn(B, A, K, requires_grad=True))
    teacher = Teacher(torch.randn(20, V), lambda logits_NV: logits_NV, torch.randint(0, 20, (B, A, K)))
    label, mask = torch.randint(0, V, (B, A, K)), torch.ones(B, A, K, dtype=torch.bool)
    mask[0, 1, 2:] = False
    return drafter, blocks, teacher, label, mask


def test_it_is_the_weighted_mean_of_the_plain_losses():
    drafter, blocks, teacher, label, mask = example()
    weights = Weights(decay=3.0, cross_entropy=0.2, l1=0.7, confidence=0.6, kl=0.3)
    got = objective(drafter, blocks, teacher, label, mask, weights)
    plain = slot_losses(drafter.slot_logits(blocks.hidden_BAKD, None), teacher.last_TD[teacher.place_BAK], label)
    weight = mask * torch.exp(-torch.arange(K) / 3.0)
    names = ("cross_entropy", "l1", "kl")
    expected = sum(getattr(weights, name) * weighted_mean(getattr(plain, name), weight) for name in names)
    bce = confidence_loss(blocks.confidence_BAK, plain.acceptance)
    expected = expected + 0.6 * weighted_mean(bce, weight)
    torch.testing.assert_close(got.total, expected)
    torch.testing.assert_close(got.acceptance_BAK, plain.acceptance * mask)
    torch.testing.assert_close(got.weight, weight.sum())
    inputs = (blocks.hidden_BAKD, blocks.confidence_BAK, drafter.head_VD)
    for found, wanted in zip(
        torch.autograd.grad(got.total, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_weights_fall_with_the_slot():
    device = torch.device("cpu")
    torch.testing.assert_close(Weights(decay=3.0).of_slots(3, device), torch.tensor([0.0, -1 / 3, -2 / 3]).exp())
    geometric = Weights(decay=0.8, decay_kind="geometric").of_slots(3, device)
    torch.testing.assert_close(geometric, torch.tensor([1.0, 0.8, 0.64]))
    with pytest.raises(UserError, match="use exponential or geometric"):
        Weights(decay_kind="linear")


def test_slots_that_do_not_count_change_nothing():
    drafter, blocks, teacher, label, mask = example()
    first = objective(drafter, blocks, teacher, label, mask, Weights())
    changed = Blocks(blocks.hidden_BAKD.detach().clone(), None, blocks.confidence_BAK.detach().clone())
    changed.hidden_BAKD[0, 1, 2:] += 7
    changed.confidence_BAK[0, 1, 2:] -= 7
    assert objective(drafter, changed, teacher, label, mask, Weights()).total == first.total
    assert (first.acceptance_BAK[0, 1, 2:] == 0).all()


def test_labels_outside_a_pruned_vocabulary_have_no_cross_entropy():
    drafter, blocks, teacher, label, mask = example(draft_vocabulary=4)
    drafter.draft_ids = torch.tensor([2, 3, 5, 9])
    got = objective(drafter, blocks, teacher, label, mask, Weights(cross_entropy=1.0, l1=0.0, confidence=0.0))
    log_q = drafter.slot_logits(blocks.hidden_BAKD, None).log_softmax(-1)
    each = torch.zeros(B, A, K)
    for index, token in enumerate(drafter.draft_ids):
        each = torch.where(label == token, -log_q[..., index], each)
    torch.testing.assert_close(got.total, weighted_mean(each, mask * Weights().of_slots(K, mask.device)))


def test_a_batch_without_a_supervised_slot_is_zero_with_gradients():
    drafter, blocks, teacher, label, mask = example()
    got = objective(drafter, blocks, teacher, label, mask & False, Weights())
    assert got.total == 0 and got.weight == 0
    assert torch.autograd.grad(got.total, blocks.hidden_BAKD)[0].abs().sum() == 0
