"""Losses made a chunk at a time equal the specification, in value and gradient."""

import pytest
import torch

from dspark.ops.chunked_loss import Rows, Scale, weighted_loss
from dspark.ops.losses import slot_losses

N, D, R, V = 13, 6, 3, 17
PRUNED = torch.tensor([0, 2, 3, 7, 8, 12, 16])


def rows_of(kind, pruned, chunk, seed=0):
    """Slots with a head that reads hidden rows, latents and a matrix of its own, and their plain total."""
    torch.manual_seed(seed)
    width = len(PRUNED) if pruned else V
    hidden_ND, latent_Nr, own_Vr = (torch.randn(n, m, dtype=kind) for n, m in ((N, D), (N, R), (width, R)))
    frozen_VD, target_PV = torch.randn(width, D, dtype=kind), torch.randn(5, V, dtype=kind)
    place_N = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 4, 4, 4])
    for tensor in (hidden_ND, latent_Nr, own_Vr):
        tensor.requires_grad_()
    label_N = torch.randint(-1 if pruned else 0, width, (N,))
    weight_N = torch.rand(N, dtype=torch.float64 if kind == torch.float64 else torch.float32)
    scale, ids_V = Scale(0.3, 0.9, 0.5), PRUNED if pruned else None
    rows = Rows(
        draft=lambda h, z: h @ frozen_VD.T + z @ own_Vr.T,
        target=lambda places: target_PV[places],
        place_N=place_N,
        label_N=label_N,
        weight_N=weight_N,
        scale=scale,
        draft_ids_V=ids_V,
        chunk=chunk,
        fewest=1,
    )
    plain = slot_losses(rows.draft(hidden_ND, latent_Nr), target_PV[place_N], label_N, ids_V)
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


def test_a_parameter_that_some_chunks_do_not_read():
    torch.manual_seed(0)
    first_VD, second_VD = (torch.randn(V, D, requires_grad=True) for _ in range(2))
    hidden_ND, target_PV = torch.randn(4, D), torch.randn(4, V)
    rows = Rows(
        draft=lambda h, z: h @ (first_VD if torch.equal(h, hidden_ND[:2]) else second_VD).T,
        target=lambda places: target_PV[places],
        place_N=torch.arange(4),
        label_N=torch.zeros(4, dtype=torch.long),
        weight_N=torch.ones(4),
        scale=Scale(1.0, 1.0),
        chunk=2 * V,
        fewest=1,
    )
    loss, _ = weighted_loss(rows, hidden_ND, None, [first_VD, second_VD])
    for part, found in zip((slice(0, 2), slice(2, 4)), torch.autograd.grad(loss, [first_VD, second_VD]), strict=True):
        matrix_VD = torch.zeros(V, D).copy_((first_VD, second_VD)[part.start // 2].detach()).requires_grad_()
        plain = slot_losses(hidden_ND[part] @ matrix_VD.T, target_PV[part], rows.label_N[part])
        expected = torch.autograd.grad((plain.cross_entropy + plain.l1).sum(), matrix_VD)[0]
        torch.testing.assert_close(found, expected)
