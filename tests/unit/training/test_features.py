"""The target's hidden states, also from several threads at once, and remembered."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.models.taps import features
from dspark.training.features import OnlineTarget, Remembered

TAPS = (-1, 0, 2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=3, **heads)
    ).eval()


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 23, (2, 9), generator=generator) for _ in range(count)]


def test_threads_see_their_own_hidden_states(model):
    target = OnlineTarget(model, TAPS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(target, batches(40)))
    for token_BS, (taps_BSD, last_BSD) in zip(batches(40), found, strict=True):
        expected_BSD, expected_last_BSD = features(model, token_BS, TAPS)
        torch.testing.assert_close(taps_BSD, expected_BSD)
        torch.testing.assert_close(last_BSD, expected_last_BSD)


def test_logits_at_the_slots(model):
    target, token_BS = OnlineTarget(model, TAPS), batches(1)[0]
    _, last_BSD = target(token_BS)
    logits_BAKV = target.logits(last_BSD, torch.tensor([[0, 5], [2, 3]]), 4)
    torch.testing.assert_close(logits_BAKV[1, 0, 3], model(token_BS).logits[1, 5])


def test_remembered_rows_in_another_batch(model):
    calls = []
    target = OnlineTarget(model, TAPS)
    remembered = Remembered(lambda token_BS: calls.append(len(token_BS)) or target(token_BS))
    one, two = batches(2)
    first, _ = remembered(one, [10, 11])
    remembered(two[:, :6], [12, 13])
    again, last_BSD = remembered(
        torch.stack([one[1], torch.cat([two[0, :6], torch.zeros(3, dtype=torch.long)])]), [11, 12]
    )
    assert calls == [2, 2]
    torch.testing.assert_close(again[0].float(), first[1], rtol=1e-2, atol=1e-2)
    assert (last_BSD[1, 6:] == 0).all()
