"""Slot losses on a vocabulary small enough to work out by hand."""

import pytest
import torch

from dspark.ops.losses import Rows, Scale, confidence_loss, slot_losses, weighted_loss, weighted_mean


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


N, D, R, V = 13, 6, 3, 17
PRUNED = torch.tensor([0, 2, 3, 7, 8, 12, 16])


def rows_of(kind, pruned, chunk, seed=0):
    """Slots with a head that reads hidden rows, latents and a matrix of its own, and their plain total."""
    torch.manual_seed(seed)
    width = len(PRUNED) if pruned else V
    hidden_ND, latent_Nr, own_Vr = (torch.randn(n, m, dtype=kind) for n, m in ((N, D), (N, R), (width, R)))
    frozen_VD, target_NV = torch.randn(width, D, dtype=kind), torch.randn(N, V, dtype=kind)
    for tensor in (hidden_ND, latent_Nr, own_Vr):
        tensor.requires_grad_()
    label_N = torch.randint(-1 if pruned else 0, width, (N,))
    weight_N = torch.rand(N, dtype=torch.float64 if kind == torch.float64 else torch.float32)
    scale, ids_V = Scale(0.3, 0.9, 0.5), PRUNED if pruned else None
    rows = Rows(
        draft=lambda h, z: h @ frozen_VD.T + z @ own_Vr.T,
        target=lambda some: target_NV[some],
        label_N=label_N,
        weight_N=weight_N,
        scale=scale,
        draft_ids_V=ids_V,
        chunk=chunk,
        fewest=1,
    )
    plain = slot_losses(rows.draft(hidden_ND, latent_Nr), target_NV, label_N, ids_V)
    total = (weight_N * (0.3 * plain.cross_entropy + 0.9 * plain.l1 + 0.5 * plain.kl)).sum()
    return rows, (hidden_ND, latent_Nr, own_Vr), plain, total


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("chunk", [1, 5 * V, 1000])
@pytest.mark.parametrize(("kind", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_chunks_give_the_plain_values_and_gradients(kind, bound, chunk, pruned):
    rows, inputs, plain, total = rows_of(kind, pruned, chunk)
    hidden_ND, latent_Nr, own_Vr = inputs
    unused = torch.zeros(2, requires_grad=True)
    loss, values = weighted_loss(rows, hidden_ND, latent_Nr, [own_Vr, unused])
    torch.testing.assert_close(loss, total, rtol=bound, atol=bound)
    for name in ("cross_entropy", "l1", "kl", "acceptance"):
        torch.testing.assert_close(getattr(values, name), getattr(plain, name).detach(), rtol=bound, atol=bound)
    found = torch.autograd.grad(2 * loss, [*inputs, unused], allow_unused=True)
    wanted = torch.autograd.grad(2 * total, inputs)
    for one, other in zip(found, wanted, strict=False):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)
    assert found[-1] is None


def test_without_gradients_only_values_are_made():
    rows, (hidden_ND, latent_Nr, own_Vr), _, total = rows_of(torch.float32, False, 40)
    with torch.no_grad():
        loss, _ = weighted_loss(rows, hidden_ND, latent_Nr, [own_Vr])
    assert not loss.requires_grad
    torch.testing.assert_close(loss, total.detach())


def test_the_whole_vocabulary_as_a_pruned_one_changes_nothing():
    torch.manual_seed(0)
    draft, target, label = torch.randn(N, V), torch.randn(N, V), torch.randint(0, V, (N,))
    one, other = slot_losses(draft, target, label), slot_losses(draft, target, label, torch.arange(V))
    for name in one._fields:
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_acceptance_counts_what_the_target_puts_outside_a_pruned_vocabulary():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.4])
    losses = slot_losses(q.log(), p.log(), torch.tensor(-1), torch.tensor([0, 1]))
    torch.testing.assert_close(losses.acceptance, torch.tensor(0.8))
    assert losses.cross_entropy == 0
