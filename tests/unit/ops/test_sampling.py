"""`shape` against its definition and against the library's own warpers; `draw` never draws the impossible."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark.common.sampling_params import SamplingParams
from dspark.ops.history import Counted, History
from dspark.ops.sampling import Shaping, draw, race, shape
from dspark.ops.truncation import nucleus, nucleus_plain

V = 50


def logits(rows: int, vocabulary: int = V) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2


MANY = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=0),
    SamplingParams(top_k=5),
    SamplingParams(top_k=V + 3),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.4, top_k=20, top_p=0.7, min_p=0.05),
    SamplingParams(temperature=0, top_k=2, top_p=0.5, min_p=0.4),
    SamplingParams(repetition_penalty=1.8, temperature=0.9),
]


@pytest.mark.parametrize("params", MANY, ids=str)
def test_as_hugging_face(params):
    x, prompt = logits(4), torch.tensor([[1, 2, 2, 7]] * 4)
    found = shape(x, Shaping.of([params] * 4), History.of(prompt.tolist(), [[]] * 4, V))
    wanted = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(prompt, x)
    if params.temperature == 0:
        assert torch.equal(found, torch.nn.functional.one_hot(wanted.argmax(-1), V).double())
        return
    wanted = TemperatureLogitsWarper(float(params.temperature))(prompt, wanted)
    if params.top_k:
        wanted = TopKLogitsWarper(params.top_k)(prompt, wanted)
    if params.top_p < 1:
        wanted = TopPLogitsWarper(params.top_p)(prompt, wanted)
    if params.min_p:
        wanted = MinPLogitsWarper(params.min_p)(prompt, wanted)
    assert torch.allclose(found, wanted.softmax(-1), atol=1e-14)


def test_a_row_does_not_depend_on_its_neighbours():
    x, history = logits(len(MANY)), History.of([[1, 2]] * len(MANY), [[3]] * len(MANY), V)
    together = shape(x, Shaping.of(MANY), history)
    for row, params in enumerate(MANY):
        alone = shape(x[row : row + 1], Shaping.of([params]), history.select([row]))
        assert torch.equal(alone[0], together[row])
    rows = [2, 0, 3, *[1] * (len(MANY) - 3)]
    index = [i for i, n in enumerate(rows) for _ in range(n)]
    repeated = shape(x[index], Shaping.of(MANY).repeat(rows), history.select(index))
    assert torch.equal(repeated, together[index])


@pytest.mark.parametrize("params", [SamplingParams(top_p=0.9), SamplingParams(top_p=0.6, top_k=300)], ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_looking_at_the_top_only_gives_what_sorting_gives(params, scale):
    """Peaked, middling and flat rows over a vocabulary wide enough for every short cut."""
    x = logits(3, 10_000) * torch.tensor([[scale], [3.0], [1.0]])
    batch = [params, SamplingParams(top_p=0.9), SamplingParams(min_p=0.01)]
    found = shape(x, Shaping.of(batch))
    for row, p in enumerate(batch):
        law = x[row].softmax(-1)
        falling = law.sort(descending=True)
        kept = torch.ones(10_000, dtype=torch.bool)
        if p.top_k:
            kept[p.top_k :] = False
        mass = (falling.values * kept).cumsum(0)
        kept &= (mass - falling.values) < p.top_p * mass[-1]
        kept &= falling.values >= p.min_p * falling.values[0]
        wanted = torch.zeros_like(law).index_put((falling.indices[kept],), falling.values[kept])
        assert torch.allclose(found[row], wanted / wanted.sum(), atol=1e-15)


@pytest.mark.parametrize("width", [7, 4096])
def test_the_kernels_nucleus_is_the_plain_one(width):
    """Exactly: peaked, flat and tied rows, masses on a border, no top-p, rows short of the mass, no numbers."""
    torch.manual_seed(0)
    rows = [(torch.randn(width) * scale).softmax(0) for scale in (0.0, 0.01, 1.0, 3.0, 30.0)]
    rows += [torch.zeros(width).index_fill(0, torch.arange(4), 0.25), torch.full((width,), 0.5 / width)]
    rows += [torch.full((width,), float("nan"))]
    for top_p in (0.0, 1e-9, 0.25, 0.5, 0.9, 0.999999, 1.0):
        p_BV, top_p_B1 = torch.stack(rows), torch.full((len(rows), 1), top_p, dtype=torch.float64)
        assert torch.equal(nucleus(p_BV, top_p_B1), nucleus_plain(p_BV, top_p_B1).nan_to_num())
        for row, alone in enumerate(rows):
            assert torch.equal(nucleus(alone[None], top_p_B1[:1])[0], nucleus(p_BV, top_p_B1)[row])


def test_penalties_and_bias_by_hand():
    x = torch.tensor([[2.0, -2.0, 1.0, 0.5]], dtype=torch.float64)
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={3: -1.5, 0: 0.125}
    )
    found = shape(x, Shaping.of([params]), History.of([[1]], [[0, 2, 2]], 4))
    wanted = torch.tensor([2.0 / 2 - 0.5 - 0.25 + 0.125, -4.0, 0.5 - 1.0 - 0.25, 0.5 - 1.5], dtype=torch.float64)
    assert torch.allclose(found[0], wanted.softmax(-1), atol=1e-15)


def test_temperature_0_takes_the_lowest_of_equals():
    x = torch.zeros(2, 4096)
    x[1, [4000, 77]] = 1.0
    assert shape(x, Shaping.of([SamplingParams(temperature=0)] * 2)).argmax(-1).tolist() == [0, 77]


def test_dtypes():
    for dtype, wanted in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        for params in MANY[:-1]:
            found = shape(logits(1).to(dtype), Shaping.of([params]))
            assert found.dtype == wanted
            assert float(found.sum()) == pytest.approx(1.0, abs=1e-5)


def test_counts_that_follow_a_text_are_those_of_the_whole_text():
    texts, wanted = [Counted([1, 2, 2], V), Counted([4], V)], History.of([[1, 2, 2], [4]], [[3, 3, 1, 3], [9]], V)
    for tokens in ([3], [3, 1], [], [3]):
        texts[0].follow(tokens)
    texts[1].follow([9])
    found = Counted.together(texts)
    assert torch.equal(found.prompt_BV, wanted.prompt_BV) and torch.equal(found.output_BV, wanted.output_BV)
    assert [text.counted for text in texts] == [4, 1]


def test_history_counts_the_drafts_before_each_row():
    history = History.of([[0], [1]], [[2, 2], []], 4)
    rows = history.rows([2, 1], torch.tensor([[3, 2], [0, 1]]))
    assert rows.output_BV.tolist() == [[0, 0, 2, 0], [0, 0, 2, 1], [0, 0, 3, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert rows.prompt_BV[:, :2].tolist() == [[True, False]] * 3 + [[False, True]] * 2
    assert history.advanced(torch.tensor([3, 3])).output_BV.tolist() == [[0, 0, 2, 1], [0, 0, 0, 1]]
    assert history.output_BV.tolist() == [[0, 0, 2, 0], [0, 0, 0, 0]]
    assert history.rows([0, 0], None).output_BV.tolist() == history.output_BV.tolist()


laws = st.lists(st.sampled_from([0.0, 0.0, 1e-45, 1e-30, 1e-8, 0.1, 0.3, 1.0]), min_size=1, max_size=9).filter(any)
uniforms = st.one_of(st.sampled_from([2.0**-53, 0.5, 1 - 2.0**-53, 1.0]), st.floats(1e-16, 1.0))


@settings(max_examples=300)
@given(laws, uniforms, st.sampled_from([torch.float32, torch.float64]))
def test_draw_never_draws_probability_zero(law, u, dtype):
    p = torch.tensor([law], dtype=dtype)
    token = int(draw(p, torch.tensor([u], dtype=torch.float64)))
    assert p[0, token] > 0


@given(st.integers(2, 40), st.integers(0, 2**31))
@settings(max_examples=50)
def test_draw_is_the_inverse_of_the_cumulative_law(width, seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(1, width, generator=generator).softmax(-1)
    ends = p.double().cumsum(-1)[0] / p.double().sum()
    for token in range(width):
        low = float(ends[token - 1]) if token else 0.0
        middle = torch.tensor([(low + float(ends[token])) / 2], dtype=torch.float64)
        assert int(draw(p, middle)) == token


def test_race_skips_probability_zero_and_is_the_gumbel_argmax():
    p, e = torch.tensor([[0.0, 0.2, 0.8]]), torch.tensor([[2.0**-31, 0.1, 0.5]])
    assert int(race(p, e)) == int((p.log() - e.log()).argmax(-1)) == 1


def test_nothing_is_drawn_from_what_is_not_a_number():
    assert int(draw(torch.tensor([[math.nan, 0.5]]), torch.tensor([0.5]))) == 2
