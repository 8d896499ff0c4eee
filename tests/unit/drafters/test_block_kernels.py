"""A block drafter's forwards by the kernels are its modules' own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dspark.common.sampling_params import SamplingParams
from dspark.drafters import dspark
from dspark.drafters.backbone import Backbone
from dspark.drafters.base import DraftContext
from dspark.drafters.body import Body
from dspark.drafters.dspark import DSpark
from dspark.drafters.heads import ConfidenceHead, VanillaMarkov
from dspark.drafters.layers import BackboneConfig
from dspark.drafters.native import native_block, native_context
from dspark.models.batch import Ragged
from dspark.ops.cpu import load_kernels
from dspark.ops.draws import Draws
from dspark.ops.history import History
from dspark.ops.linear import pack_linears
from dspark.ops.races import race_keys
from dspark.ops.sampling import Shaping
from dspark.speculation.draft_sampler import DraftSampler
from dspark.speculation.grammar import Guide
from dspark.speculation.noise import RoundNoise

pytestmark = pytest.mark.skipif(not load_kernels(), reason="no C++ compiler: everything runs eagerly")
PAGE, DTYPES = 4, {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tap_count": 2,
}


def assert_near(got, want, tolerance):
    for one, other in zip(got, want, strict=True):
        error = (one.float() - other.float()).abs().max() / other.float().abs().max()
        assert error <= tolerance, f"off by {error:.2g} of the largest value"


def body(dtype, **options) -> Body:
    torch.manual_seed(0)
    config = BackboneConfig(**SHAPE | options)
    head = torch.nn.Linear(config.hidden_size, 90, bias=False)
    made = Body(Backbone(config), torch.nn.Embedding(90, config.hidden_size), head, mask_token_id=89)
    made = made.to(dtype).eval().requires_grad_(False)
    pack_linears(made)
    made.allocate(40, PAGE)
    return made


@pytest.mark.parametrize(
    "options", [{}, {"model_type": "qwen2"}, {"windows": (5, 0)}], ids=["qwen3", "qwen2", "window"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_forwards_of_a_block_drafter_equal_their_modules(dtype, options):
    drafter = body(dtype, **options)
    context, block = native_context(drafter), native_block(drafter)
    table_RP = torch.arange(1, 11, dtype=torch.int32).view(2, 5)
    position_T = torch.cat((torch.arange(7), torch.arange(13)))
    slot_T = table_RP.repeat_interleave(torch.tensor([7, 13]), 0)[torch.arange(20), position_T // PAGE].long() * PAGE
    slot_T = slot_T + position_T % PAGE
    taps_TD = torch.randn(20, 96).to(dtype)
    pools = [pool for pair in drafter.pools for pool in pair]
    written = []
    for run in (drafter._context.module, context):
        mine = [pool.clone() for pool in pools]
        run(taps_TD, position_T, slot_T, *mine)
        written.append(mine)
    assert_near(written[1], written[0], DTYPES[dtype])
    inputs = (torch.tensor([4, 8]), torch.tensor([7, 13]), table_RP, torch.arange(5), *written[0])
    assert_near(block(*inputs), drafter._block.module(*inputs), DTYPES[dtype])


def drafter_of(dtype, rank, *, native):
    made = body(dtype)
    torch.manual_seed(2)
    markov, confidence = VanillaMarkov(90, rank, 48).to(dtype), ConfidenceHead(48, rank).to(dtype)
    drafter = DSpark(made, markov, confidence, taps=(0, 1), block_size=5).eval().requires_grad_(False)
    drafter.pack()
    drafter.allocate(40, PAGE)
    if native:
        drafter.compile_forwards()
        assert drafter._round is not None
    return drafter


def two_rounds(drafter, temperature, *, raced=False, **cut):
    """A context of 7 and 13 tokens, a round, three rows more, and a round that needs them."""
    torch.manual_seed(3)
    table_RP = torch.arange(1, 15, dtype=torch.int32).view(2, 7)
    drafts = []
    for rows, start in (((7, 13), (0, 0)), ((2, 1), (7, 13))):
        position = [torch.arange(s, s + n) for n, s in zip(rows, start, strict=True)]
        slot = [table_RP[r][p // PAGE].long() * PAGE + p % PAGE for r, p in enumerate(position)]
        taps_TD = torch.randn(sum(rows), 96).to(drafter.markov_head.markov_w1.weight.dtype)
        batch = Ragged(torch.zeros(0), torch.cat(position), torch.cat(slot), table_RP, torch.zeros(0), torch.zeros(0))
        drafter.extend(batch, taps_TD)
        keys = race_keys([1, 2], [6, 0], [0, 1], 5) if raced else None
        draws = Draws(
            Shaping.of([SamplingParams(temperature=t, **cut) for t in temperature]).knobs_R4,
            torch.rand(2, 5).double(),
            keys,
        )
        ends = torch.tensor([s + n for n, s in zip(rows, start, strict=True)])
        context = DraftContext(torch.tensor([4, 8]), ends, table_RP, 5, [0, 1], [], None, draws)
        drafts.append(drafter.propose(context))
    return drafts


@pytest.mark.parametrize("temperature", [(0.0, 0.0), (1.0, 0.7), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("rank", [16, 24])
@pytest.mark.parametrize("how", [{}, {"raced": True}, {"top_k": 9, "top_p": 0.9}], ids=str)
def test_a_round_by_one_kernel_is_extend_block_and_chain(rank, temperature, how):
    wanted = two_rounds(drafter_of(torch.float32, rank, native=False), temperature, **how)
    found = two_rounds(drafter_of(torch.float32, rank, native=True), temperature, **how)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got.token_RK, want.token_RK) and got.length_R == want.length_R
        torch.testing.assert_close(got.probability_RKV, want.probability_RKV, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.confidence_RK, want.confidence_RK, rtol=1e-4, atol=1e-6)


class Steps:
    """A grammar's matcher: behind a token of remainder m by 3 come those of remainder m + 1."""

    trouble, complete = None, False

    def __init__(self, first):
        self.taken = [first]

    def allowed(self):
        return np.arange(90) % 3 == (self.taken[-1] + 1) % 3

    def advance(self, token):
        assert self.allowed()[token]
        self.taken.append(token)

    def rollback(self, tokens):
        del self.taken[len(self.taken) - tokens :]


@pytest.mark.parametrize("temperature", [(0.0, 0.0), (1.0, 0.7), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("grammars", [(4, 8), (None, 8)], ids=["both", "one"])
def test_a_block_with_grammars_is_drawn_by_the_kernel_slot_by_slot(temperature, grammars, monkeypatch):
    """The same tokens, laws and confidences as through the sampler; a slot is masked before it is drawn."""
    calls = []
    chain = dspark.draft_chain
    monkeypatch.setattr(dspark, "draft_chain", lambda *given: (calls.append(given), chain(*given))[1])
    table_RP = torch.arange(1, 15, dtype=torch.int32).view(2, 7)
    drafter = drafter_of(torch.float32, 16, native=True)
    params = [SamplingParams(temperature=heat) for heat in temperature]
    drafts = []
    for kernel in (True, False):
        guide = Guide([None if first is None else Steps(first) for first in grammars])
        noise = RoundNoise.of([3, 4], [0, 0], [0, 0], [False, False], slots=5)
        sampler = DraftSampler(Shaping.of(params), noise, None, guide)
        context = DraftContext(torch.tensor([4, 8]), torch.tensor([0, 0]), table_RP, 5, [0, 1], [], sampler)
        ways = {"draws": sampler.draws, "rules": guide} if kernel else {}
        drafts.append(drafter.propose(replace(context, **ways)))
        assert all(path.taken == 5 for path in guide.paths.values()), "a token was not taken"
    one, two = drafts
    assert len(calls) == 5 and torch.equal(one.token_RK, two.token_RK)
    torch.testing.assert_close(one.probability_RKV, two.probability_RKV, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.confidence_RK, two.confidence_RK, rtol=1e-4, atol=1e-6)
    free = drafter.propose(replace(context, sampler=None, draws=sampler.draws))
    assert not torch.equal(free.token_RK[1], one.token_RK[1]), "the grammar forbade nothing: the test says less"


def test_penalties_and_biases_reach_the_kernels_draft(monkeypatch):
    """The first slot's law is the sampler's; later ones leave out what the block itself repeats."""
    calls = []
    chain = dspark.draft_chain
    monkeypatch.setattr(dspark, "draft_chain", lambda *given: (calls.append(given), chain(*given))[1])
    drafter, table_RP = drafter_of(torch.float32, 16, native=True), torch.arange(1, 15, dtype=torch.int32).view(2, 7)
    params = [SamplingParams(frequency_penalty=1.5, presence_penalty=0.5), SamplingParams(logit_bias={7: 3.0}, top_k=9)]
    history = History.of([[4], [8]], [[3, 3, 17] * 9, []], 90)
    noise = RoundNoise.of([3, 4], [0, 0], [0, 0], [False, True], slots=5)
    sampler = DraftSampler(Shaping.of(params), noise, history)
    context = DraftContext(torch.tensor([4, 8]), torch.tensor([0, 0]), table_RP, 5, [0, 1], [], sampler)
    one, two = (drafter.propose(replace(context, draws=way)) for way in (sampler.draws, None))
    free = DraftSampler(Shaping.of([SamplingParams(), SamplingParams(top_k=9)]), noise)
    other = drafter.propose(replace(context, sampler=None, draws=free.draws))
    assert len(calls) == 1, "the requests without penalties draw in the round's kernel"
    assert torch.equal(one.token_RK[:, 0], two.token_RK[:, 0])
    torch.testing.assert_close(one.probability_RKV[:, 0], two.probability_RKV[:, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.probability_RKV.sum(2), torch.ones(2, 5))
    assert (one.probability_RKV[0, :, 3] < 0.1 * other.probability_RKV[0, :, 3]).all()
    assert ((one.probability_RKV[1] > 0).sum(1) <= 9).all()


def test_a_drafter_of_another_block_is_left_to_the_compiler():
    assert native_block(body(torch.float32, hidden_act="gelu")) is None
    assert native_context(body(torch.float32, model_type="gemma4_text")) is None
