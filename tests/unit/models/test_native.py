"""The kernel of a whole decoder is the module's own forward, row by row, and refuses what it does not compute."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from dspark.models.batch import Ragged
from dspark.models.target import ATTENTION, Target
from dspark.ops.cpu import load_kernels

pytestmark = pytest.mark.skipif(not load_kernels(), reason="no C++ compiler: everything runs eagerly")
PAGE, TAPS = 4, (-1, 0, 2)
SHAPE = {
    "vocab_size": 90,  # not a multiple of the kernel's 16
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE | {"hidden_size": 128}),
    "llama": lambda: LlamaConfig(
        **SHAPE, attention_bias=True, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}
    ),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=6),
}
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def make(config, dtype=torch.float32) -> Target:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return Target(model.eval().requires_grad_(False))


def batch(lengths, contexts) -> Ragged:
    width = max(-(-(n + c) // PAGE) for n, c in zip(lengths, contexts, strict=True))
    table_RP = torch.arange(1, 1 + width * len(lengths)).view(-1, width)
    position = [torch.arange(c, c + n) for n, c in zip(lengths, contexts, strict=True)]
    slot = [table_RP[r][p // PAGE] * PAGE + p % PAGE for r, p in enumerate(position)]
    position_T = torch.cat(position)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return Ragged(
        position_T * 7 % 90, position_T, torch.cat(slot), table_RP.int(), bounds.int(), torch.tensor(contexts).int()
    )


def filled(target):
    torch.manual_seed(1)
    pool = target.allocate(40, PAGE)
    for pages in pool.keys + pool.values:
        pages.normal_()
    return pool


def both(target, pool, step, rows_B, taps):
    """Outputs and pages, by the module and then by the kernel."""
    results = []
    for run in (lambda: None, lambda: target.compile(taps, PAGE)):
        graph = run()
        assert graph is None or (graph.status == "compiled" and graph._thread is None), "nothing had to be compiled"
        pool_now = type(pool)([k.clone() for k in pool.keys], [v.clone() for v in pool.values], pool.pages, PAGE)
        logits, tapped = target.forward(step, pool_now, rows_B, taps)
        results.append([logits, tapped, *pool_now.keys, *pool_now.values])
    return results


def assert_near(got, want, tolerance):
    for one, other in zip(got, want, strict=True):
        error = (one.float() - other.float()).abs().max() / other.float().abs().max()
        assert error <= tolerance, f"off by {error:.2g} of the largest value"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_equals_the_module_on_a_mixed_batch(family, dtype):
    target = make(CONFIGS[family](), dtype)
    step = batch((1, 8, 19), (9, 3, 0))
    module, kernel = both(target, filled(target), step, torch.tensor([0, 1, 5, 27]), TAPS)
    assert_near(kernel, module, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_depend_on_nothing_beside_it(dtype):
    target = make(CONFIGS["qwen3"](), dtype)
    pool = filled(target)
    for taps in (TAPS, ()):
        target.compile(taps, PAGE)
    whole, tapped = target.forward(batch((30,), (9,)), pool, torch.arange(30), TAPS)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for rows in (1, 2, 7, 8, 9, 16, 17):
                step = batch((rows,), (9,))
                part, part_tapped = target.forward(step, pool, torch.arange(rows), TAPS)
                assert torch.equal(part, whole[:rows]) and torch.equal(part_tapped, tapped[:rows])
                assert torch.equal(target.forward(step, pool, torch.arange(rows))[0], part), "taps change the logits"
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SHAPE, layer_types=["full_attention"] * 3),
        Qwen3Config(**SHAPE | {"head_dim": 16}),
        Qwen3Config(**SHAPE | {"hidden_act": "gelu"}),
        LlamaConfig(**SHAPE, mlp_bias=True),
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
    ids=["gemma2", "small heads", "gelu", "mlp bias", "dynamic rope"],
)
def test_what_it_does_not_compute_is_left_to_the_compiler(config):
    assert make(config)._native((), PAGE) is None


def test_a_position_beyond_the_angles_is_refused():
    target = make(CONFIGS["qwen3"]())
    target.compile((), PAGE)
    pool = target.allocate(8, PAGE)
    step = batch((1,), (9,))
    far = Ragged(
        step.token_T, step.position_T + 5000, step.slot_T, step.page_table_RP, step.cu_query_R1, step.context_R
    )
    with pytest.raises(RuntimeError, match="position 5009 has no angle"):
        target.forward(far, pool, torch.arange(1))
