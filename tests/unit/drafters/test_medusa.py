"""Medusa heads read the hidden state before the anchor and nothing else."""

import pytest
import torch
from drafting import HIDDEN, PAGE, VOCABULARY, Greedy, context_of, drafter_fields, pages_of, ragged

from dspark.drafters import checkpoint
from dspark.drafters.config import parse
from dspark.drafters.medusa import Medusa
from dspark.drafters.registry import load_drafter

FIELDS = {
    "architectures": ["MedusaModel"],
    "medusa_num_heads": 3,
    "medusa_num_layers": 2,
    "medusa_own_heads": False,
    "target_layer_ids": [3],
}


def made(own):
    torch.manual_seed(0)
    config = parse(drafter_fields(**FIELDS) | {"medusa_own_heads": own}, "config.json")
    head = checkpoint.head_of(torch.randn(VOCABULARY, HIDDEN))
    drafter = checkpoint.build(config, torch.randn(VOCABULARY, HIDDEN), head).eval()
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    drafter.allocate(33, PAGE)
    return drafter, config


def expected(drafter, tap_D):
    """Straight from the paper: x + SiLU(W x + b) for every block of a head, then its LM head."""
    rms = (tap_D.pow(2).mean() + drafter.config.rms_norm_eps).sqrt()
    for head in drafter.medusa_head:
        x_D = tap_D / rms * drafter.norm.weight
        for block in list(head)[:2]:
            x_D = x_D + torch.nn.functional.silu(block.linear.weight @ x_D + block.linear.bias)
        yield int(((head[2] if drafter.lm_head is None else drafter.lm_head).weight @ x_D).argmax())


@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_every_head_drafts_its_own_place(own):
    drafter, _ = made(own)
    table_RP, taps_SD = pages_of([0, 0]), torch.randn(9, HIDDEN)
    drafter.extend(ragged([range(5), range(4)], table_RP, [0, 0]), taps_SD)
    draft = drafter.propose(
        context_of([7, 8], [5, 3], table_RP, Greedy(), slots=3)
    )  # the second one's last is rejected
    assert draft.token_RK.tolist() == [[*expected(drafter, taps_SD[4])], [*expected(drafter, taps_SD[7])]]


@pytest.mark.parametrize("own", [False, True])
def test_saved_and_loaded(own, target, tmp_path):
    drafter, config = made(own)
    checkpoint.save(drafter, config, tmp_path / "d")
    again, read = checkpoint.load(tmp_path / "d")
    assert read == config
    assert all(torch.equal(tensor, drafter.state_dict()[name]) for name, tensor in again.state_dict().items())
    checkpoint.save(drafter, config, tmp_path / "bare", frozen=False)
    assert (tmp_path / "bare" / "model.safetensors").stat().st_size <= (
        tmp_path / "d" / "model.safetensors"
    ).stat().st_size
    loaded = load_drafter(tmp_path / "bare", target)
    assert isinstance(loaded, Medusa)
    assert loaded.block_size == 3
