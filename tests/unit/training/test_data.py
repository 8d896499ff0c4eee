"""Documents on disk come back as sequences; a damaged directory is said in one line."""

import json

import numpy as np
import pytest
import torch

from dspark.common.errors import UserError
from dspark.training.data import Documents, write_documents

DOCUMENTS = [
    (list(range(10, 20)), [0] * 4 + [1] * 6),
    ([30, 31, 32], [1, 1, 1]),
    ([40, 41, 42], [0, 0, 1]),  # nothing to learn: one supervised token has no next one
]


@pytest.fixture
def directory(tmp_path):
    assert write_documents(tmp_path / "d", DOCUMENTS, vocabulary=50, about={"seed": 1}) == 16
    return tmp_path / "d"


def test_documents_are_cut_and_padded(directory):
    data = Documents(directory, 6)
    assert len(data) == 3
    token_BS, mask_BS, start_BS, pieces = data.batch([(0,), (1,), (2,)])
    assert start_BS.tolist() == [[0] * 6, [0, 0, 0, 0, 4, 4], [0, 0, 0, 3, 3, 3]] and pieces == ((0,), (1,), (2,))
    assert token_BS.tolist() == [[10, 11, 12, 13, 14, 15], [16, 17, 18, 19, 0, 0], [30, 31, 32, 0, 0, 0]]
    assert mask_BS.long().tolist() == [[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert [data.size((n,)) for n in range(3)] == [6, 4, 3] and data.size((0, 2)) == 9
    assert json.loads((directory / "about.json").read_text()) == {"seed": 1}


def test_every_epoch_reads_everything_once_in_another_order(directory):
    data = Documents(directory, 3)
    count = len(data)
    read = [n for step in range(count * 2) for n in data.rows(step, 3, seed=5)]
    epochs = [read[i * count : (i + 1) * count] for i in range(6)]
    assert all(sorted(epoch) == [(n,) for n in range(count)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert data.rows(4, 3, seed=5) == read[12:15]


def test_packed_rows_keep_their_pieces_apart(directory):
    data = Documents(directory, 6, row_tokens=9)
    assert data.spread(9) == [(0, 2), (1,)]
    batch = data.batch([(0, 2), (1,)])
    assert batch.token_BS.tolist() == [[10, 11, 12, 13, 14, 15, 30, 31, 32], [16, 17, 18, 19, 0, 0, 0, 0, 0]]
    assert batch.start_BS.tolist() == [[0] * 6 + [6] * 3, [0] * 4 + [4] * 5]
    assert batch.spans == [(0, 0, 0, 6), (2, 0, 6, 9), (1, 1, 0, 4)]


def test_large_vocabularies(tmp_path):
    write_documents(tmp_path / "d", [([70_000, 70_001], [1, 1])], vocabulary=150_000)
    assert torch.equal(Documents(tmp_path / "d", 8).batch([(0,)]).token_BS, torch.tensor([[70_000, 70_001]]))


def test_bad_directories(directory, tmp_path):
    with pytest.raises(UserError, match=r"nowhere has no tokens.npy"):
        Documents(tmp_path / "nowhere", 8)
    with pytest.raises(UserError, match="no tokens to write"):
        write_documents(tmp_path / "empty", [], vocabulary=50)
    np.save(directory / "mask.npy", np.zeros(16, dtype=np.uint8))
    with pytest.raises(UserError, match="no supervised tokens"):
        Documents(directory, 8)
    np.save(directory / "mask.npy", np.ones(15, dtype=np.uint8))
    with pytest.raises(UserError, match="16 tokens, 15 mask values"):
        Documents(directory, 8)
    whole = (directory / "tokens.npy").read_bytes()
    (directory / "tokens.npy").write_bytes(whole[:20])
    with pytest.raises(UserError, match=r"tokens.npy is truncated or corrupted"):
        Documents(directory, 8)
