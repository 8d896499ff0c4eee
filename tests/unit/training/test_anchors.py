"""Anchors stand where drafting starts in supervised text; labels stop at the first unsupervised token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.training.anchors import every_anchor, labels, sample_anchors
from dspark.training.data import Batch


def batch_of(mask_BS, token_BS=None, start_BS=None):
    mask_BS = torch.as_tensor(mask_BS).bool()
    zeros_BS = torch.zeros(mask_BS.shape, dtype=torch.long)
    pieces = tuple((row,) for row in range(len(mask_BS)))
    return Batch(
        zeros_BS if token_BS is None else token_BS, mask_BS, zeros_BS if start_BS is None else start_BS, pieces
    )


@settings(max_examples=50)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(1, 12))
def test_every_kept_anchor_is_eligible_and_none_twice(rows, count):
    anchor_BA, keep_BA = sample_anchors(batch_of(rows), count, 0)
    for mask, anchors, keep in zip(rows, anchor_BA.tolist(), keep_BA.tolist(), strict=True):
        eligible = {i for i in range(8) if mask[i] and mask[i + 1]}
        kept = [a for a, k in zip(anchors, keep, strict=True) if k]
        assert len(kept) == min(count, len(eligible))
        assert kept == sorted(set(kept))
        assert set(kept) <= eligible
        assert all(0 <= a < 9 for a in anchors)


def test_every_eligible_position_is_drawn_as_often():
    mask_BS = torch.tensor([[1, 1, 1, 0, 1, 1]]).expand(4000, 6)
    anchor_BA, keep_BA = sample_anchors(batch_of(mask_BS), 1, 0)
    assert keep_BA.all()
    share = torch.bincount(anchor_BA.flatten(), minlength=6) / 4000
    torch.testing.assert_close(share, torch.tensor([1, 1, 0, 0, 1, 0]) / 3, atol=0.03, rtol=0)


def test_labels_stop_at_the_first_unsupervised_token_and_at_the_end():
    token_BS = torch.arange(10, 18)[None]
    mask_BS = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]], dtype=torch.uint8)
    anchor_BA = torch.tensor([[0, 4, 6]])
    label_BAK, count_BAK = labels(batch_of(mask_BS, token_BS), anchor_BA, torch.tensor([[True, True, False]]), 4)
    assert label_BAK[0, 0].tolist() == [11, 12, 13, 14]
    assert label_BAK[0, 1, :3].tolist() == [15, 16, 17]
    assert count_BAK[0].tolist() == [[True, True, False, False], [True, True, True, False], [False] * 4]


def test_no_anchor_and_no_label_crosses_into_another_document():
    start_BS = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7]])
    batch = batch_of(torch.ones(1, 8), torch.arange(8)[None], start_BS)
    anchor_BA, keep_BA = sample_anchors(batch, 8, 0)
    assert anchor_BA[keep_BA].tolist() == [0, 1, 3, 4, 5]
    label_BAK, mask_BAK = labels(batch, anchor_BA, keep_BA, 3)
    assert [label_BAK[0, a][mask_BAK[0, a]].tolist() for a in range(5)] == [[1, 2], [2], [4, 5, 6], [5, 6], [6]]


def test_an_anchor_at_every_position():
    batch = batch_of([[1, 1, 1, 0, 1, 1]], start_BS=torch.tensor([[0, 0, 2, 2, 2, 2]]))
    anchor_BA, keep_BA = every_anchor(batch)
    assert anchor_BA.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert keep_BA.tolist() == [[True, False, False, False, True, False]]


def test_a_document_has_the_same_anchors_alone_and_packed():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(size, generator=generator) < 0.8 for size in (14, 9, 20)]
    start_BS = torch.tensor([[0] * 14 + [14] * 9 + [23] * 20])
    packed = batch_of(torch.cat(masks)[None], start_BS=start_BS)._replace(pieces=((5, 3, 8),))
    anchor_BA, keep_BA = sample_anchors(packed, 4, 7)
    together = anchor_BA[keep_BA].tolist()
    apart = []
    for piece, mask, begin in zip((5, 3, 8), masks, (0, 14, 23), strict=True):
        alone_BA, kept_BA = sample_anchors(batch_of(mask[None])._replace(pieces=((piece,),)), 4, 7)
        assert kept_BA.sum() == 4
        apart += [begin + a for a in alone_BA[kept_BA].tolist()]
    assert together == apart


def test_rows_with_fewer_anchors_repeat_their_last():
    anchor_BA, keep_BA = sample_anchors(batch_of([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0] * 5]), 3, 0)
    assert keep_BA.sum(1).tolist() == [3, 1, 0]
    assert anchor_BA[1].tolist() == [1, 1, 1] and anchor_BA[2].tolist() == [0, 0, 0]
