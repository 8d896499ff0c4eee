"""CPU kernels equal their plain twins, and a row's bits do not depend on how many rows share the call."""

import shutil
import time

import pytest
import torch
import torch.nn.functional as F

from dspark.ops.attention import ragged_attention, ragged_attention_plain, store, store_plain
from dspark.ops.cpu import load_kernels
from dspark.ops.linear import PackedLinear, pack_linears

needs_kernels = pytest.mark.skipif(not load_kernels(), reason="no C++ compiler: torch runs everything")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def test_kernels_build_wherever_there_is_a_compiler():
    assert load_kernels() or not shutil.which("g++")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 64), (50, 62), (7, 128), (4096, 256)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_torch(dtype, n, k, bias):
    torch.manual_seed(0)
    plain = torch.nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(13, k).to(dtype)
    want = F.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    got = PackedLinear(plain.weight, plain.bias)(x)
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_bits_do_not_depend_on_its_neighbours(dtype, threads):
    torch.manual_seed(0)
    linear = PackedLinear(torch.randn(352, 256).to(dtype))
    x = torch.randn(40, 256).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = linear(x)
        for rows in (1, 2, 3, 7, 8, 9, 16, 31):
            for start in (0, 5):
                assert torch.equal(linear(x[start : start + rows]), whole[start : start + rows])
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_rows_are_no_slower_than_torch_by_far(dtype):
    """On any processor: vectors that do not fit its registers once cost 20 times as much, and every value was right."""
    linear, rows = PackedLinear(torch.randn(1024, 1024).to(dtype)), torch.randn(8, 1024)
    plain, ours, theirs = torch.randn(1024, 1024), [], []
    for _ in range(30):
        start = time.perf_counter()
        linear(rows.to(dtype))
        middle = time.perf_counter()
        F.linear(rows, plain)
        ours.append(middle - start), theirs.append(time.perf_counter() - middle)
    assert min(ours) < 3 * min(theirs)


@needs_kernels
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 300.0, 1e30])
@pytest.mark.parametrize("k", [30, 64, 1152])
def test_bfloat16_products_are_as_good_as_the_rounding_of_their_result(scale, k):
    """Weights and rows of any magnitude, outliers among them: the error is at most 1.3 times bfloat16's own."""
    torch.manual_seed(0)
    weight = torch.randn(64, k) * torch.logspace(-4, 2, 64)[:, None]
    x = torch.randn(200, k)
    x[:, 3] *= 500  # one channel far above the others, as large models have
    weight, x = weight.bfloat16(), (x * scale).bfloat16()
    exact = x.double() @ weight.double().T
    got, rounded = PackedLinear(weight)(x).double(), exact.bfloat16().double()
    size = exact.square().mean(0).sqrt()  # of each output
    error, floor = (((y - exact) / size).square().mean().sqrt() for y in (got, rounded))
    assert error <= 1.3 * floor


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row_and_its_output(dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(9, 64)
    x[2, 5], x[4, 6], x[6] = float("nan"), float("inf"), 0
    weight[40, 1] = float("nan")
    got = PackedLinear(weight.to(dtype))(x.to(dtype))
    finite = torch.ones(9, 48, dtype=torch.bool)
    finite[[2, 4]], finite[:, 40] = False, False
    assert torch.equal(got.isfinite(), finite)
    assert (got[6, :40] == 0).all()


def case(dtype, lengths, contexts, *, heads=4, groups=2, key=24, value=20, page=4, seed=0):
    torch.manual_seed(seed)
    width = max(-(-(c + n) // page) for c, n in zip(contexts, lengths, strict=True)) + 1
    table = (torch.randperm(width * len(lengths)) + 1).int().view(len(lengths), width)
    pool = [torch.randn((width * len(lengths) + 1) * page, groups, size).to(dtype) for size in (key, value)]
    tokens = sum(lengths)
    q = torch.randn(tokens + 2, heads, key).to(dtype)  # two rows of padding at the end
    k, v = torch.randn(tokens + 2, groups, key).to(dtype), torch.randn(tokens + 2, groups, value).to(dtype)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, *pool, table, cu, torch.tensor(contexts, dtype=torch.int32), page


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 2.0)])
def test_attention_equals_its_plain_twin(dtype, causal, window, softcap):
    arguments = case(dtype, [1, 9, 20, 0, 3], [17, 0, 6, 5, 40])
    want = ragged_attention_plain(*arguments, 0.3, causal, window, softcap)
    got = ragged_attention(*arguments, 0.3, causal, window, softcap)
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not got[-2:].any(), "padding rows come out zero"


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_row_does_not_depend_on_the_block_it_is_in(dtype):
    page = 4
    q, k, v, pool_k, pool_v, table, _, _, _ = case(dtype, [12], [30], page=page)
    q, k, v = q[:12], k[:12], v[:12]

    def run(start, stop, context):
        cu = torch.tensor([0, stop - start], dtype=torch.int32)
        length = torch.tensor([context], dtype=torch.int32)
        part = (x[start:stop] for x in (q, k, v))
        return ragged_attention(*part, pool_k, pool_v, table, cu, length, page, 0.3, True)

    whole = run(0, 12, 30)
    slots = torch.tensor([int(table[0, p // page]) * page + p % page for p in range(30, 42)])
    store(k, v, pool_k, pool_v, slots)
    for start, stop in ((0, 1), (1, 2), (3, 11), (7, 12)):
        assert torch.equal(run(start, stop, 30 + start), whole[start:stop])


@needs_kernels
def test_store_equals_its_plain_twin():
    _, k, v, pool_k, pool_v, *_ = case(torch.bfloat16, [9], [0])
    slots = torch.tensor([3, 4, 9, 0, 1, 2, 7, 5, 6, 8, 10])
    want_k, want_v = pool_k.clone(), pool_v.clone()
    store_plain(k, v, want_k, want_v, slots)
    store(k, v, pool_k, pool_v, slots)
    assert torch.equal(pool_k, want_k)
    assert torch.equal(pool_v, want_v)


@needs_kernels
def test_pack_linears_swaps_every_linear_and_keeps_the_function():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).requires_grad_(False)
    x = torch.randn(5, 8)
    want = net(x)
    assert pack_linears(net) == 2
    torch.testing.assert_close(net(x), want)
