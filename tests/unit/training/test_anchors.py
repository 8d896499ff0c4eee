"""Anchors stand where drafting starts in supervised text; labels stop at the first unsupervised token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.training.anchors import labels, sample_anchors


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(1, 12))
def test_every_kept_anchor_is_eligible_and_none_twice(rows, count):
    mask_BS = torch.tensor(rows)
    anchor_BA, keep_BA = sample_anchors(mask_BS, count, torch.Generator().manual_seed(0))
    for mask, anchors, keep in zip(rows, anchor_BA.tolist(), keep_BA.tolist(), strict=True):
        eligible = {i for i in range(8) if mask[i] and mask[i + 1]}
        kept = [a for a, k in zip(anchors, keep, strict=True) if k]
        assert len(kept) == min(count, len(eligible))
        assert kept == sorted(set(kept))
        assert set(kept) <= eligible
        assert all(0 <= a < 9 for a in anchors)


def test_every_eligible_position_is_drawn_as_often():
    mask_BS = torch.tensor([[1, 1, 1, 0, 1, 1]]).expand(4000, 6)
    anchor_BA, keep_BA = sample_anchors(mask_BS, 1, torch.Generator().manual_seed(0))
    assert keep_BA.all()
    share = torch.bincount(anchor_BA.flatten(), minlength=6) / 4000
    torch.testing.assert_close(share, torch.tensor([1, 1, 0, 0, 1, 0]) / 3, atol=0.03, rtol=0)


def test_labels_stop_at_the_first_unsupervised_token_and_at_the_end():
    token_BS = torch.arange(10, 18)[None]
    mask_BS = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]], dtype=torch.uint8)
    anchor_BA = torch.tensor([[0, 4, 6]])
    label_BAK, count_BAK = labels(token_BS, mask_BS, anchor_BA, torch.tensor([[True, True, False]]), 4)
    assert label_BAK[0, 0].tolist() == [11, 12, 13, 14]
    assert label_BAK[0, 1, :3].tolist() == [15, 16, 17]
    assert count_BAK[0].tolist() == [[True, True, False, False], [True, True, True, False], [False] * 4]
