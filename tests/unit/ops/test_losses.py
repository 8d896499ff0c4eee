"""Slot losses on a vocabulary small enough to work out by hand."""

import torch

from dspark.ops.losses import confidence_loss, slot_losses, weighted_mean


def test_acceptance_is_the_overlap_of_the_two_distributions():
    p, q = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5])
    losses = slot_losses(q.log(), p.log(), torch.tensor(0))
    torch.testing.assert_close(losses.acceptance, torch.tensor(0.8))
    torch.testing.assert_close(losses.l1, torch.tensor(0.4))
    torch.testing.assert_close(losses.cross_entropy, torch.tensor(2.0).log())


def test_gradients_reach_the_drafter_alone():
    draft, target = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    losses = slot_losses(draft, target, torch.tensor([0, 1, 2]))
    assert not losses.acceptance.requires_grad
    assert torch.autograd.gradcheck(
        lambda x: slot_losses(x, target.double(), torch.tensor([0, 1, 2]))[:2], draft.double(), eps=1e-3, atol=1e-3
    )


def test_confidence_loss_is_least_at_its_label():
    label = torch.tensor(0.3)
    at = confidence_loss(label.logit(), label)
    assert at < confidence_loss(label.logit() + 0.5, label)
    assert at < confidence_loss(label.logit() - 0.5, label)


def test_weighted_mean_of_nothing_is_zero():
    assert weighted_mean(torch.ones(3), torch.zeros(3)) == 0
    assert weighted_mean(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0])) == 3.25


def test_the_whole_vocabulary_as_a_pruned_one_changes_nothing():
    torch.manual_seed(0)
    draft, target, label = torch.randn(13, 17), torch.randn(13, 17), torch.randint(0, 17, (13,))
    one, other = slot_losses(draft, target, label), slot_losses(draft, target, label, torch.arange(17))
    for name in one._fields:
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_acceptance_counts_what_the_target_puts_outside_a_pruned_vocabulary():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.4])
    losses = slot_losses(q.log(), p.log(), torch.tensor(-1), torch.tensor([0, 1]))
    torch.testing.assert_close(losses.acceptance, torch.tensor(0.8))
    assert losses.cross_entropy == 0
