"""What training computes for a place is what the engine drafts there, token by token."""

import pytest
import torch
from drafting import HIDDEN, LAYERS, PAGE, VOCABULARY, Greedy, context_of, drafter_fields, pages_of, ragged

from dspark.drafters import checkpoint
from dspark.drafters.config import parse
from dspark.drafters.layer_skip import ExitHead, LayerSkip
from dspark.drafters.lesson import Lesson
from dspark.models.taps import features

SLOTS = 3
ONE_TAP = {"target_layer_ids": [LAYERS - 1]}
SHAPES = {
    "eagle3": {"architectures": ["Qwen3Eagle3Model"], "ttt_length": SLOTS},
    "eagle3, windowed": {
        "architectures": ["Qwen3Eagle3Model"],
        "ttt_length": SLOTS,
        "layer_types": ["sliding_attention"],
        "sliding_window": 3,
        "use_sliding_window": True,
    },
    "eagle3, pruned": {"architectures": ["Qwen3Eagle3Model"], "ttt_length": SLOTS, "draft_vocab_size": 30},
    "mtp": ONE_TAP
    | {
        "architectures": ["Qwen3MTPModel"],
        "num_nextn_predict_layers": SLOTS,
        "num_hidden_layers": SLOTS,
        "layer_types": ["full_attention"] * SLOTS,
    },
    "medusa": ONE_TAP
    | {"architectures": ["MedusaModel"], "medusa_num_heads": SLOTS, "medusa_num_layers": 2, "medusa_own_heads": False},
    "medusa, own heads": ONE_TAP
    | {"architectures": ["MedusaModel"], "medusa_num_heads": SLOTS, "medusa_num_layers": 1, "medusa_own_heads": True},
    "layer_skip": {"architectures": ["LayerSkipModel"], "block_size": SLOTS, "target_layer_ids": [1]},
}


def made(kind, target, head=None):
    torch.manual_seed(0)
    base = drafter_fields(num_hidden_layers=1, layer_types=["full_attention"])
    drafter = checkpoint.build(
        parse(base | SHAPES[kind], "config.json"), target.embedding_VD, head or target.head
    ).eval()
    for parameter in drafter.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    if kind == "eagle3, pruned":
        drafter.adopt(torch.randperm(VOCABULARY)[:30].sort().values)
    return drafter


def text(target, length, seed):
    """Tokens and the taps the target gives them, by the library's own forward."""
    token_S = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))

    def seen(taps):
        model = target.model
        implementation = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        found = features(model, token_S[None], taps)[0][0]
        model.set_attn_implementation(implementation)
        return found

    return token_S, seen


class Forced(Greedy):
    """Draws the given tokens."""

    def __init__(self, token_K):
        super().__init__()
        self.token_K = token_K

    def draw(self, logits_RV, slot):
        super().draw(logits_RV, slot)
        return self.token_K[slot][None], logits_RV.softmax(-1)


def drafted(drafter, target, token_S, taps_SD, anchor):
    """Logits [K, V] the engine's side shows its sampler after `anchor` committed tokens and the anchor."""
    table_RP, batch = pages_of([0], width=8), ragged([token_S[:anchor]], pages_of([0], width=8), [0])
    if isinstance(drafter, ExitHead):
        drafter, pool = LayerSkip(target, drafter), target.allocate(9, PAGE)
        target.forward(batch, pool, torch.zeros(1, dtype=torch.long))
        drafter.share(pool)
    else:
        drafter.allocate(9, PAGE)
    drafter.extend(batch, taps_SD[:anchor])
    sampler = Forced(token_S[anchor + 1 :])
    drafter.propose(context_of([int(token_S[anchor])], [anchor], table_RP, sampler, slots=SLOTS))
    return torch.cat(sampler.seen)


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_packed_rows_give_what_the_engine_drafts(kind, target):
    drafter = made(kind, target)
    pieces = [text(target, 12, 1), text(target, 9, 2), text(target, 7, 3)]
    tokens = [token_S for token_S, _ in pieces]
    taps = [seen(drafter.taps) for _, seen in pieces]
    token_BS = torch.stack((torch.cat(tokens[:2]), torch.cat((tokens[2], tokens[2][:1].expand(14)))))
    taps_BSD = torch.stack((torch.cat(taps[:2]), torch.cat((taps[2], taps[2].new_zeros(14, taps[2].shape[1])))))
    start_BS = torch.tensor([[0] * 12 + [12] * 9, [0] * 7 + [7] * 14])
    anchor_BA = torch.tensor([[1, 8, 15], [2, 3, 3]])
    blocks = drafter(Lesson(token_BS, taps_BSD, start_BS, anchor_BA))
    latent = None if blocks.latent_BAKr is None else blocks.latent_BAKr.flatten(0, 2)
    logits_BAKV = drafter.slot_logits(blocks.hidden_BAKD.flatten(0, 2), latent).unflatten(0, (2, 3, SLOTS))
    for row, place, piece, anchor in ((0, 0, 0, 1), (0, 1, 0, 8), (0, 2, 1, 3), (1, 0, 2, 2), (1, 1, 2, 3)):
        wanted_KV = drafted(drafter, target, tokens[piece], taps[piece], anchor)
        if drafter.draft_ids is not None:
            wanted_KV = wanted_KV[:, drafter.draft_ids]
        torch.testing.assert_close(logits_BAKV[row, place], wanted_KV, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", SHAPES)
def test_every_weight_learns_and_the_targets_do_not(kind, target):
    drafter = made(kind, target, head=checkpoint.head_of(torch.randn(VOCABULARY, HIDDEN))).train()
    token_S, seen = text(target, 12, 1)
    taps_1SD = seen(drafter.taps)[None]
    blocks = drafter(Lesson.of(token_S[None], taps_1SD, torch.tensor([[3, 5, 8]])))
    latent = None if blocks.latent_BAKr is None else blocks.latent_BAKr.flatten(0, 2)
    drafter.slot_logits(blocks.hidden_BAKD.flatten(0, 2), latent).logsumexp(-1).sum().backward()
    for name, parameter in drafter.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad, name


@pytest.mark.parametrize("kind", ["eagle3", "mtp", "medusa"])
def test_nothing_is_learnt_where_a_text_begins(kind, target):
    drafter = made(kind, target)
    token_S, seen = text(target, 6, 1)
    blocks = drafter(Lesson.of(token_S[None], seen(drafter.taps)[None], torch.tensor([[0, 2]])))
    assert blocks.hidden_BAKD[0, 0].abs().sum() == 0
    assert blocks.hidden_BAKD[0, 1].abs().sum() > 0
