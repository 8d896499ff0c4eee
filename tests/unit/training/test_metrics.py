"""What an evaluation predicts is what speculative decoding does."""

import numpy as np
import torch

from dspark.training.data import Batch
from dspark.training.metrics import predicted, walk

TARGET = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.45, 0.1, 0.45]])  # p(next | this)
DRAFT = np.array([[0.3, 0.6, 0.1], [0.25, 0.25, 0.5], [0.2, 0.4, 0.4]])
SLOTS, LENGTH = 3, 14


def decode(rng):
    """Speculative decoding of LENGTH tokens after one given: (text, committed by each round)."""
    text, rounds = [0], []
    while len(text) <= LENGTH:
        committed, left = 0, LENGTH + 1 - len(text)
        for slot in range(min(SLOTS, left - 1) + 1):
            p, q = TARGET[text[-1]], DRAFT[text[-1]]
            drafting = slot < min(SLOTS, left - 1)
            token = rng.choice(3, p=q) if drafting else rng.choice(3, p=p)
            accepted = not drafting or rng.random() < min(1, p[token] / q[token])
            if drafting and not accepted:
                rest = np.maximum(p - q, 0)
                token = rng.choice(3, p=rest / rest.sum())
            text.append(int(token))
            committed += 1
            if not drafting or not accepted:
                break
        rounds.append(committed)
    return text, rounds


def rows_of(texts):
    """Texts as a batch supervised after their first token, and what each slot of each anchor was taken with."""
    token_BS = torch.tensor(texts)
    rows, width = token_BS.shape
    mask_BS = torch.ones_like(token_BS).bool()
    batch = Batch(token_BS, mask_BS, torch.zeros_like(token_BS), tuple((r,) for r in range(rows)))
    ratio = torch.from_numpy(np.minimum(1, DRAFT / TARGET))
    taken_BSK = torch.zeros(rows, width, SLOTS, dtype=torch.float64)
    for slot in range(SLOTS):
        end = width - 1 - slot
        taken_BSK[:, :end, slot] = ratio[token_BS[:, slot : slot + end], token_BS[:, slot + 1 : slot + 1 + end]]
    return batch, taken_BSK


def sample(rng):
    """LENGTH tokens of the target alone."""
    text = [0]
    for _ in range(LENGTH):
        text.append(int(rng.choice(3, p=TARGET[text[-1]])))
    return text


def test_it_predicts_what_decoding_does():
    rng = np.random.default_rng(0)
    rounds = [decode(rng)[1] for _ in range(1500)]
    tau = sum(map(sum, rounds)) / sum(map(len, rounds))
    found = predicted(walk(*rows_of([sample(rng) for _ in range(1500)])))
    assert abs(found["tau"] / tau - 1) < 0.02


def test_every_token_is_committed_once_and_answers_stand_alone():
    rng = np.random.default_rng(1)
    batch, taken_BSK = rows_of([sample(rng) for _ in range(5)])
    alone = walk(batch, taken_BSK)
    torch.testing.assert_close(float(alone["committed"]), 5.0 * LENGTH)
    both = Batch(
        torch.cat([batch.token_BS] * 2, 1),
        torch.cat([batch.mask_BS] * 2, 1),
        torch.cat([batch.start_BS, torch.full_like(batch.start_BS, LENGTH + 1)], 1),
        batch.pieces,
    )
    packed = walk(both, torch.cat([taken_BSK] * 2, 1))
    for name, value in alone.items():
        torch.testing.assert_close(packed[name], 2 * value)


def test_a_perfect_draft_and_a_useless_one():
    batch, taken_BSK = rows_of([[0] * (LENGTH + 1)])
    assert predicted(walk(batch, torch.zeros_like(taken_BSK)))["tau"] == 1
    perfect = predicted(walk(batch, torch.ones_like(taken_BSK)))
    assert perfect["tau"] == LENGTH / np.ceil(LENGTH / (SLOTS + 1))
    assert perfect["acceptance"] == [1.0] * SLOTS
