"""The target's hidden states: run, packed, kept and read back."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from dspark.common.errors import UserError
from dspark.models.taps import features
from dspark.training.anchors import eligible
from dspark.training.data import Batch, Documents, write_documents
from dspark.training.features import FeatureConfig, OnlineTarget, open_features
from dspark.training.features.encoding import Encoding, Piece
from dspark.training.features.modes import admitted_pieces, piece_bytes

TAPS = (-1, 0, 2)
SHAPE = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": None,
}


def build(config_class, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**SHAPE, **more)).eval()


@pytest.fixture(scope="module")
def model():
    return build(Qwen3Config)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    documents = [(rng.integers(0, 23, n), [0] * 2 + [1] * (n - 2)) for n in (9, 12, 5, 12, 7, 10)]
    write_documents(tmp_path / "data", documents, vocabulary=23)
    return Documents(tmp_path / "data", 12, 24)


def batches(count):
    generator = torch.Generator().manual_seed(0)
    zeros_BS = torch.zeros(2, 9, dtype=torch.long)
    tokens = [torch.randint(0, 23, (2, 9), generator=generator) for _ in range(count)]
    return [Batch(token_BS, zeros_BS.bool(), zeros_BS, ((0,), (1,))) for token_BS in tokens]


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


@pytest.mark.parametrize("family", [Qwen3Config, LlamaConfig, Gemma3TextConfig])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_piece_has_the_hidden_states_it_has_alone(family, attention, data):
    model = build(family, **({"sliding_window": 4} if family is Gemma3TextConfig else {}))
    model.set_attn_implementation(attention)
    target, batch = OnlineTarget(model, TAPS), data.batch(data.spread(3))
    assert max(len(row) for row in batch.pieces) > 1
    together = target(batch)
    for piece, row, begin, end in batch.spans:
        for found, alone in zip(together, target(data.batch([(piece,)])), strict=True):
            torch.testing.assert_close(found[row, begin:end], alone[0], rtol=1e-4, atol=1e-5)


def opened(config, model, data, directory, calls=None):
    target = OnlineTarget(model, TAPS)
    if calls is not None:
        target.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    return open_features(config, target, data, directory), target


@pytest.mark.parametrize(("kind", "bound"), [("bfloat16", 1e-2), ("float8", 7e-2)])
@pytest.mark.parametrize("place", ["", "memory"])
def test_read_back_they_are_the_targets_own_rounded(model, data, tmp_path, kind, bound, place):
    batch = data.batch(data.spread(2))
    expected = OnlineTarget(model, TAPS)(batch)
    cached, _ = opened(FeatureConfig("hybrid", place, kind), model, data, tmp_path / "cache")
    first = cached(batch)
    calls = []
    cached.target.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    again = cached(batch)
    assert not calls
    wanted_BS, inside_BS = eligible(batch), torch.zeros(batch.token_BS.shape, dtype=torch.bool)
    for _, row, begin, end in batch.spans:
        inside_BS[row, begin:end] = True
    for found, other, exact, where in zip(first, again, expected, (inside_BS, wanted_BS), strict=True):
        assert torch.equal(found, other)
        torch.testing.assert_close(found[where], exact[where], rtol=bound, atol=bound * float(exact[where].std()))
        assert (found[~where] == 0).all()


def test_cached_text_never_meets_the_target_again_and_a_stopped_filling_goes_on(model, data, tmp_path):
    opened(FeatureConfig("cached"), model, data, tmp_path / "cache")
    shards = sorted((tmp_path / "cache").glob("*.shard"))
    assert len(shards) == 1
    calls = []
    cached, _ = opened(FeatureConfig("cached"), model, data, tmp_path / "cache", calls)
    for step in range(4):
        cached(data.batch(data.rows(step, 2, 0)))
    assert not calls
    shards[0].unlink()
    again = []
    opened(FeatureConfig("cached"), model, data, tmp_path / "cache", again)
    assert len(again) == len(data.pieces)


def test_beside_new_pieces_those_that_are_kept_stay_as_they_are(model, data, tmp_path):
    cached, target = opened(FeatureConfig("hybrid", "memory"), model, data, tmp_path)
    taps_SW, last_nD = torch.ones(9, 48), torch.ones(6, 16)
    cached.store.put(0, cached.encoding.encode(Piece(taps_SW, last_nD)))
    batch = data.batch([(0,), (1,)])
    taps_BSW, _ = cached(batch)
    assert torch.equal(taps_BSW[0, :9], taps_SW)
    torch.testing.assert_close(taps_BSW[1], target(batch)[0][1], rtol=1e-2, atol=1e-2)
    assert cached.store.get(1) is not None


def test_several_fill_one_directory_and_find_each_others_pieces(model, data, tmp_path):
    config, target = FeatureConfig("cached"), OnlineTarget(model, TAPS)
    one = open_features(config, target, data, tmp_path / "cache", share=(0, 2))
    open_features(config, target, data, tmp_path / "cache", share=(1, 2))
    assert all(one.store.get(piece) is not None for piece in range(len(data.pieces)))


def test_the_budget_bounds_what_is_kept(model, data, tmp_path):
    encoding = Encoding("float8", 48, 16)
    sizes = piece_bytes(data, encoding)
    budget = float(sizes[:3].sum() + 1) / 1e9
    assert admitted_pieces(data, encoding, budget) == 3
    cached, _ = opened(FeatureConfig("hybrid", "", "float8", budget), model, data, tmp_path / "cache")
    for row in data.spread(9):
        cached(data.batch([row]))
    cached.flush()
    assert [cached.store.get(piece) is not None for piece in range(6)] == [True] * 3 + [False] * 3
    assert sum(cached.store.get(piece).numel() for piece in range(3)) == sizes[:3].sum()


def test_damage_is_found(model, data, tmp_path):
    opened(FeatureConfig("cached"), model, data, tmp_path / "cache")
    (shard,) = (tmp_path / "cache").glob("*.shard")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(UserError, match="corrupted at piece 0; delete the file"):
        opened(FeatureConfig("cached"), model, data, tmp_path / "cache")
    for cut in (whole[:-3], whole[: len(whole) // 2], whole[:5], b""):
        shard.write_bytes(cut)
        with pytest.raises(UserError, match="truncated or corrupted"):
            opened(FeatureConfig("cached"), model, data, tmp_path / "cache")


def test_another_target_data_or_format_is_refused(model, data, tmp_path):
    opened(FeatureConfig("cached"), model, data, tmp_path / "cache")
    with pytest.raises(UserError, match="features of format 'bfloat16', this run has 'float8'"):
        opened(FeatureConfig("cached", format="float8"), model, data, tmp_path / "cache")
    with pytest.raises(UserError, match="features of target"):
        opened(FeatureConfig("cached"), build(LlamaConfig), data, tmp_path / "cache")
    with pytest.raises(UserError, match="features of length 12, this run has 9"):
        opened(FeatureConfig("cached"), model, Documents(data.directory, 9), tmp_path / "cache")


def test_what_a_killed_process_left_is_removed(model, data, tmp_path):
    opened(FeatureConfig("cached"), model, data, tmp_path / "cache")
    left = tmp_path / "cache" / ".00000000-aabbccdd.shard.4194305"  # no process has such a number
    left.write_bytes(b"half")
    opened(FeatureConfig("cached"), model, data, tmp_path / "cache")
    assert not left.exists()


@pytest.mark.parametrize("change", [{"mode": "offline"}, {"format": "int4"}, {"budget_gb": -1.0}])
def test_mistakes(change):
    with pytest.raises(UserError, match="features: "):
        replace(FeatureConfig(), **change)


def test_fp8_keeps_small_channels_beside_outliers():
    generator = torch.Generator().manual_seed(0)
    x_SW = torch.randn(64, 8, generator=generator) * torch.tensor([1e-4, 1e-2, 1.0, 30.0, 1e4, 1.0, 1.0, 0.0])
    x_SW[0, 5] = 5000.0  # one token's outlier
    encoding = Encoding("float8", 8, 8)
    back = encoding.decode(encoding.encode(Piece(x_SW, x_SW[:3])), 64, torch.float32)
    assert encoding.encode(Piece(x_SW, x_SW[:3])).numel() == encoding.size(64, 3)
    error_W = (back.taps_SW - x_SW).norm(dim=0) / x_SW.norm(dim=0).clamp(min=1e-30)
    assert error_W.max() < 0.04
    assert ((back.taps_SW - x_SW)[1:, 5].norm() / x_SW[1:, 5].norm()) < 0.04
    torch.testing.assert_close(back.last_nD, back.taps_SW[:3], rtol=0.1, atol=0.2)
