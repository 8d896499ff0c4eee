"""The estimate's bytes are those the stores write, and its times add up."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.common.errors import UserError
from dspark.training.data import Documents, write_documents
from dspark.training.estimate import Counts, Rates, estimates, kept_bytes, throughput
from dspark.training.features.encoding import FORMATS, Encoding
from dspark.training.features.modes import FeatureConfig, open_features, piece_bytes
from dspark.training.features.online import OnlineTarget

HIDDEN, TAPS = 32, (0, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    documents = [(rng.integers(1, 50, n).tolist(), (rng.random(n) < 0.7).astype(int).tolist()) for n in range(2, 90, 3)]
    directory = tmp_path_factory.mktemp("estimate") / "tokens"
    write_documents(directory, documents, vocabulary=50)
    return Documents(directory, 40, 40)


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3Config(vocab_size=50, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=3, **heads)
    return OnlineTarget(Qwen3ForCausalLM(config).eval(), TAPS)


@pytest.mark.parametrize("name", list(FORMATS))
def test_bytes_are_those_on_disk(data, target, tmp_path, name):
    counts, encoding = Counts.of(data), Encoding(name, len(TAPS) * HIDDEN, HIDDEN)
    whole = kept_bytes(counts, encoding)
    assert whole == piece_bytes(data, encoding).sum()
    open_features(FeatureConfig(mode="cached", format=name), target, data, tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.shard"))
    index = 16 + 60 * counts.pieces  # of every shard, and of every piece in it
    assert whole < written <= whole + index
    found = estimates(counts, taps=len(TAPS), hidden=HIDDEN, epochs=2, rates=Rates(1, 1))
    assert {mode.bytes for mode in found if mode.mode.endswith({"bfloat16": "bf16", "float8": "fp8"}[name])} == {whole}


def test_counts(data):
    counts = Counts.of(data)
    assert counts.pieces == len(data.pieces) and counts.tokens == sum(end - begin for begin, end in data.pieces)
    supervised = sum(
        bool(data.mask[i] and data.mask[i + 1]) for begin, end in data.pieces for i in range(begin, end - 1)
    )
    assert counts.supervised == supervised > 0


def test_times_add_up():
    """1000 tokens of 2 taps of 5 numbers; the target takes 10 s, the disk 2 s for bf16, 1 s for fp8."""
    counts = Counts(tokens=1000, supervised=0, pieces=1)
    rates = Rates(tokens=100, disk=10_000)
    found = {e.mode: e for e in estimates(counts, taps=2, hidden=5, epochs=3, rates=rates)}
    assert list(found) == ["online", "cached bf16", "cached fp8", "hybrid bf16", "hybrid fp8"]
    assert (found["online"].bytes, found["online"].before, found["online"].during) == (0, 0, 30)
    assert (found["cached bf16"].bytes, found["cached bf16"].before) == (20_000, 12)
    assert found["cached bf16"].during == 6 and found["cached bf16"].seconds == 18
    assert found["hybrid bf16"].before == 0 and found["hybrid bf16"].during == 12 + 2 * 2
    assert found["cached fp8"].bytes == 10_000 + 15  # a scale for each channel of the piece
    half = {e.mode: e for e in estimates(counts, taps=2, hidden=5, epochs=3, rates=rates, budget=10_000)}
    assert half["cached bf16"].share == 0.5 and half["cached bf16"].bytes == 10_000
    assert half["cached bf16"].before == 6 and half["cached bf16"].during == 3 * 1 + 3 * 5
    assert half["hybrid bf16"].during == 6 + 2 * 1 + 3 * 5
    assert half["online"] == found["online"]


def test_published_size():
    """Qwen3-4B, five taps: 30 720 bytes a token where the last hidden state is kept for all, as published."""
    counts = Counts(tokens=1_000, supervised=1_000, pieces=1)
    assert kept_bytes(counts, Encoding("bfloat16", 5 * 2560, 2560)) == 30_720_000


def test_throughput_and_rates(data, target):
    assert throughput(target, data, rows=2, seconds=0.01) > 0
    with pytest.raises(UserError, match="0 tokens a second"):
        Rates(0, 1)
