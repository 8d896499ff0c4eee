"""The compiled forward is the eager one, for any number of rows, and its cache is trusted only after a check."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from dspark.models.batch import Ragged
from dspark.models.compiled import _trace
from dspark.models.target import ATTENTION, Target
from dspark.ops.cpu import load_kernels

pytestmark = pytest.mark.skipif(not load_kernels(), reason="no C++ compiler: everything runs eagerly")
PAGE, TAPS = 4, (0, 1)


def tiny(dtype=torch.float32) -> Target:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    return Target(model.eval().requires_grad_(False))


def run(target, pool, rows, context=9, taps=TAPS):
    pages = torch.arange(1, 12, dtype=torch.int32)
    position = torch.arange(context, context + rows)
    slot = pages.long()[position // PAGE] * PAGE + position % PAGE
    lengths = (torch.tensor([0, rows], dtype=torch.int32), torch.tensor([context], dtype=torch.int32))
    batch = Ragged((position * 7) % 64, position, slot, pages[None], *lengths)
    return target.forward(batch, pool, torch.arange(rows), taps)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPARK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_compiled_equals_eager_for_any_number_of_rows(cache, dtype, tolerance):
    target = tiny(dtype)
    pool = target.allocate(12, PAGE)
    for key in pool.keys + pool.values:
        key.normal_()
    before = {rows: run(target, pool, rows) for rows in (1, 2, 8, 30)}
    graph = target.compile(TAPS, PAGE)
    plain = target.compile((), PAGE)
    assert graph.status == plain.status == "compiling", "it starts at once and serves eagerly meanwhile"
    for each in (graph, plain):
        each.wait()
        assert each.status == "compiled", "two graphs made at once do not disturb each other"
    after = {rows: run(target, pool, rows) for rows in before}
    for rows, outputs in before.items():
        torch.testing.assert_close(after[rows], outputs, rtol=tolerance, atol=tolerance)
        for part, whole in zip(after[rows], after[30], strict=True):
            assert torch.equal(part, whole[:rows]), "a row's bits depend on how many rows share the step"
        logits, _ = run(target, pool, rows, taps=())
        assert torch.equal(logits, after[rows][0]), "plain decoding and speculation see other logits"
    again = tiny(dtype)
    assert again.compile(TAPS, PAGE).status == "compiled", "the second time it comes from the cache"
    torch.testing.assert_close(run(again, pool, 8), after[8], rtol=0, atol=0)


def test_a_broken_cache_file_is_dropped_and_the_eager_model_serves(cache, caplog):
    from dspark.ops.cpu import cache_directory

    paths = list(cache_directory().glob("graph-*.pt2"))
    for path in paths:
        path.write_bytes(b"not a package")
    target = tiny()
    with caplog.at_level(logging.WARNING):
        assert target.compile(TAPS, PAGE).status == "failed"
    assert "eagerly" in caplog.text
    assert sum(path.exists() for path in paths) == len(paths) - 1
    assert run(target, target.allocate(12, PAGE), 3)[0].shape == (3, 64)


class Difference(torch.nn.Module):
    def forward(self, a, b):
        return (a - b,)


def test_a_tensor_given_twice_stays_two_inputs():
    example = torch.arange(4.0)
    program = _trace(Difference(), (example, example))
    assert torch.equal(program.module()(example + 1, example)[0], torch.ones(4))
