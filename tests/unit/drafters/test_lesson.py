"""In training, a block sees its own document before its anchor and its true tokens before a slot; nothing else."""

import pytest
import torch
from drafting import HIDDEN, VOCABULARY, random_drafter

from dspark.drafters.lesson import Lesson

KINDS = {
    "dspark": {},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": {"markov_rank": 0, "enable_confidence_head": False},
    "anchor and masks": {"sample_from_anchor": False},
}
SIZES, SLOTS = (9, 14, 11), 5
ANCHORS = (3, 8, 9, 12, 16, 20, 25, 30)


def packed():
    generator = torch.Generator().manual_seed(0)
    total = sum(SIZES)
    token_BS = torch.randint(0, VOCABULARY - 1, (1, total), generator=generator)
    starts = torch.tensor([0, SIZES[0], SIZES[0] + SIZES[1]]).repeat_interleave(torch.tensor(SIZES))[None]
    return Lesson(token_BS, torch.randn(1, total, 2 * HIDDEN, generator=generator), starts, torch.tensor([ANCHORS]))


def answers(drafter, lesson):
    """Draft logits and confidences of every slot, [A, K, ...]."""
    with torch.no_grad():
        blocks = drafter(lesson)
        latent = None if blocks.latent_BAKr is None else blocks.latent_BAKr[0]
        logits = drafter.slot_logits(blocks.hidden_BAKD[0], latent)
    confidence = torch.zeros(logits.shape[:2]) if blocks.confidence_BAK is None else blocks.confidence_BAK[0]
    return torch.cat([logits, confidence[..., None]], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_document_is_drafted_as_alone(kind):
    drafter, _ = random_drafter(**KINDS[kind])
    lesson = packed()
    together = answers(drafter, lesson)
    begin = 0
    for size in SIZES:
        here = slice(begin, begin + size)
        mine = [i for i, a in enumerate(ANCHORS) if begin <= a < begin + size]
        anchor_BA = torch.tensor([[ANCHORS[i] - begin for i in mine]])
        alone = answers(drafter, Lesson.of(lesson.token_BS[:, here], lesson.taps_BSD[:, here], anchor_BA))
        for index, i in enumerate(mine):
            inside = min(SLOTS, begin + size - ANCHORS[i])  # past the end no slot counts
            torch.testing.assert_close(together[i, :inside], alone[index, :inside], rtol=1e-4, atol=1e-4)
        begin += size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [1, 2, 4, 6])
def test_other_documents_and_the_future_change_nothing(kind, index):
    drafter, _ = random_drafter(**KINDS[kind])
    lesson = packed()
    before, anchor, start = answers(drafter, lesson)[index], ANCHORS[index], int(lesson.start_BS[0, ANCHORS[index]])
    for slot in range(SLOTS):
        token_BS, taps_BSD = lesson.token_BS.clone(), lesson.taps_BSD.clone()
        hidden = torch.ones(token_BS.shape[1], dtype=torch.bool)
        hidden[start:anchor] = False  # taps before the anchor may be read
        taps_BSD[0, hidden] = torch.randn_like(taps_BSD[0, hidden])
        hidden[anchor : anchor + slot + 1] = False  # and tokens before the one the slot drafts
        token_BS[0, hidden] = (token_BS[0, hidden] + 1) % (VOCABULARY - 1)
        after = answers(drafter, lesson._replace(token_BS=token_BS, taps_BSD=taps_BSD))[index]
        torch.testing.assert_close(after[slot], before[slot], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_past_matters(kind):
    drafter, _ = random_drafter(**KINDS[kind])
    lesson = packed()
    before, changed = answers(drafter, lesson), lesson.taps_BSD.clone()
    changed[0, 9] += 1.0
    differs = [
        bool((x != y).any()) for x, y in zip(before, answers(drafter, lesson._replace(taps_BSD=changed)), strict=True)
    ]
    assert differs == [9 < anchor < 23 for anchor in ANCHORS]
