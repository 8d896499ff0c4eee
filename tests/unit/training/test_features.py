"""The target's hidden states, also from several threads at once, and remembered."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.models.taps import features
from dspark.training.data import Batch
from dspark.training.features import OnlineTarget, Remembered

TAPS = (-1, 0, 2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=3, **heads)
    ).eval()


def batch_of(token_BS, numbers):
    zeros_BS = torch.zeros_like(token_BS)
    return Batch(token_BS, zeros_BS.bool(), zeros_BS, tuple((number,) for number in numbers))


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [batch_of(torch.randint(0, 23, (2, 9), generator=generator), (0, 1)) for _ in range(count)]


def test_threads_see_their_own_hidden_states(model):
    target = OnlineTarget(model, TAPS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(target, batches(40)))
    for batch, (taps_BSD, last_BSD) in zip(batches(40), found, strict=True):
        expected_BSD, expected_last_BSD = features(model, batch.token_BS, TAPS)
        torch.testing.assert_close(taps_BSD, expected_BSD)
        torch.testing.assert_close(last_BSD, expected_last_BSD)


def test_logits_of_last_hidden_states(model):
    target, batch = OnlineTarget(model, TAPS), batches(1)[0]
    _, last_BSD = target(batch)
    torch.testing.assert_close(target.logits(last_BSD[1, 3:5]), model(batch.token_BS).logits[1, 3:5])


def test_no_taps(model):
    assert OnlineTarget(model, ())(batches(1)[0])[0].shape == (2, 9, 0)


def test_remembered_rows_in_another_batch(model):
    calls = []
    target = OnlineTarget(model, TAPS)

    def counted(batch):
        calls.append(len(batch.token_BS))
        return target(batch)

    counted.logits = target.logits
    remembered = Remembered(counted)
    one, two = (batch.token_BS for batch in batches(2))
    first, _ = remembered(batch_of(one, (10, 11)))
    remembered(batch_of(two[:, :6], (12, 13)))
    padded_S = torch.cat([two[0, :6], torch.zeros(3, dtype=torch.long)])
    again, last_BSD = remembered(batch_of(torch.stack([one[1], padded_S]), (11, 12)))
    assert calls == [2, 2]
    torch.testing.assert_close(again[0].float(), first[1], rtol=1e-2, atol=1e-2)
    assert (last_BSD[1, 6:] == 0).all()
