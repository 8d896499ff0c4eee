"""Muon moves a matrix equally in all its directions, and the pair of optimizers saves and schedules as one."""

import copy

import pytest
import torch
from torch import nn

from dspark.training.optimizer import Muon, build_optimizers, orthogonalise


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 12, 40), (3, 40, 12)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    result = orthogonalise(torch.randn(shape) * 100)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.4 and values.max() < 1.3


def test_orthogonalise_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(24, 24))
    v, _ = torch.linalg.qr(torch.randn(24, 24))
    matrix = u @ torch.diag(torch.linspace(1.0, 3.0, 24)) @ v.mT
    result = orthogonalise(matrix[None])[0]
    cosine = (result * (u @ v.mT)).sum() / result.norm() / (u @ v.mT).norm()
    assert cosine > 0.97


def test_a_stack_of_matrices_equals_each_alone() -> None:
    torch.manual_seed(0)
    together = torch.randn(4, 8, 20)
    alone = torch.cat([orthogonalise(one[None]) for one in together])
    torch.testing.assert_close(orthogonalise(together), alone, atol=2e-2, rtol=2e-2)


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="matrices only"):
        Muon([nn.Parameter(torch.zeros(3))])


class Tiny(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.hidden = nn.Linear(8, 8, bias=False)
        self.norm = nn.RMSNorm(8)
        self.frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.lm_head = nn.Linear(8, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.hidden(self.embed(ids))))


@pytest.mark.parametrize("tied", [True, False])
def test_only_hidden_matrices_go_to_muon(tied: bool) -> None:
    model = Tiny(tied)
    parts = build_optimizers(model, muon_lr=0.02, adam_lr=0.01).parts
    muon = [p for group in parts["muon"].param_groups for p in group["params"]]
    adam = [p for group in parts["adam"].param_groups for p in group["params"]]
    assert [id(p) for p in muon] == [id(model.hidden.weight)]
    assert len(adam) == (2 if tied else 3)


def test_an_excluded_name_goes_to_adam() -> None:
    assert "muon" not in build_optimizers(Tiny(), muon_lr=0.02, adam_lr=0.01, exclude=("hidden",)).parts


def train(model: Tiny, optimizers, steps: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 10, (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(ids), (ids + 3) % 10)
        loss.backward()
        optimizers.step()
    return loss.item()


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizers = build_optimizers(model, muon_lr=0.05, adam_lr=0.02)
    assert train(model, optimizers, 120, seed=1) < 0.1


def test_a_restart_continues_exactly() -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizers = build_optimizers(model, muon_lr=0.05, adam_lr=0.02, weight_decay=0.1)
    train(model, optimizers, 5, seed=1)
    again = copy.deepcopy(model)
    restarted = build_optimizers(again, muon_lr=0.05, adam_lr=0.02, weight_decay=0.1)
    restarted.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    train(model, optimizers, 5, seed=2)
    train(again, restarted, 5, seed=2)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_factor_scales_both_peaks_also_after_a_restart() -> None:
    optimizers = build_optimizers(Tiny(), muon_lr=0.05, adam_lr=0.02)
    optimizers.set_factor(0.1)
    optimizers.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    optimizers.set_factor(0.5)
    assert optimizers.parts["muon"].param_groups[0]["lr"] == pytest.approx(0.025)
    assert optimizers.parts["adam"].param_groups[0]["lr"] == pytest.approx(0.01)
