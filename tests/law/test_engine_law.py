"""What `LLM.generate` writes with default options is distributed as the target, and equals the reference loop.

The joint law of the first three tokens over four words is enumerated from the library's own model and compared with
samples by a chi-square test: (X² − df) / √(2 df) below 4, which a true law exceeds about once in ten thousand tries;
the engine's seed is fixed, so the outcome is too. A plan that peeks at the token it decides about must fail it.
"""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dspark.common.sampling_params import SamplingParams
from dspark.drafters import dspark
from dspark.drafters.checkpoint import build
from dspark.drafters.config import parse
from dspark.drafters.draft_model import DraftModel
from dspark.drafters.layer_skip import LayerSkip
from dspark.drafters.ngram import NGram
from dspark.engine.following import Following
from dspark.engine.llm import LLM
from dspark.models.target import ATTENTION, Target
from dspark.ops.cpu import load_kernels
from dspark.speculation import reference, verify
from dspark.speculation.cost import StepCost
from dspark.speculation.guard import Guard
from dspark.speculation.planner import parse_planner
from dspark.speculation.round import Round
from dspark.speculation.survival import survival

V, LENGTH, SAMPLES, BOUND = 4, 3, 2000, 4.0
PROMPT = [1, 3, 2, 1, 3]


def config(layers=1, seed_std=0.35):
    return Qwen3Config(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=seed_std,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def model(seed, attention="sdpa"):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM._from_config(config(), dtype=torch.float64, attn_implementation=attention).eval()


PLAIN, DRAFTING = model(5), model(6)


# What the reference loop asks, with the same networks and planner as the engine's.


@torch.no_grad()
def logits(network, tokens):
    return network(torch.tensor([list(tokens)])).logits[0, -1]


def propose(committed, drafted):
    row = logits(DRAFTING, [*committed, *drafted])
    return row, float(row.softmax(-1).max())


def plan_of(planning, rounds):
    """By the planner, but for the first of `rounds`: the engine's first never drafts."""

    def plan(confidence, limit):
        if next(rounds) == 0 or not limit:
            return 0
        return planning.plan(Round([limit]), survival(torch.tensor([confidence])))[0]

    return plan


def target_of(seed, dtype=torch.float64):
    return Target(model(seed, ATTENTION).to(dtype).requires_grad_(False))


SHAPES = {
    "dspark": {"architectures": ["Qwen3DSparkModel"]},
    "eagle3": {"architectures": ["Qwen3Eagle3Model"]},
    "eagle3, pruned": {"architectures": ["Qwen3Eagle3Model"], "draft_vocab_size": 3},
    "mtp": {"architectures": ["Qwen3MTPModel"]},
    "medusa": {"architectures": ["MedusaModel"]},
    "layer_skip": {"architectures": ["LayerSkipModel"]},
}


def drafter_of(kind, target):
    if kind == "draft_model":
        return DraftModel(target_of(6), V, block_size=3)
    if kind == "ngram":
        return NGram(V, block_size=3)
    fields = (
        config().to_dict()
        | SHAPES[kind]
        | {
            "num_target_layers": 1,
            "block_size": 3,
            "mask_token_id": 0,
            "target_layer_ids": [0],
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
            "markov_rank": 4,
            "markov_head_type": "vanilla",
            "ttt_length": 3,
            "num_nextn_predict_layers": 1,
            "medusa_num_heads": 3,
            "medusa_num_layers": 1,
            "medusa_own_heads": True,
        }
    )
    torch.manual_seed(7)
    drafter = build(parse(fields, "config.json"), target.embedding_VD, target.head).eval().to(target.dtype)
    for parameter in drafter.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    if kind == "eagle3, pruned":  # the second word is never drafted
        drafter.d2t.copy_(torch.tensor([0, 1, 1]))
    return LayerSkip(target, drafter) if kind == "layer_skip" else drafter


@torch.no_grad()
def exact_law(temperature=1.0, top_k=0, top_p=1.0):
    """P(x1, x2, x3 | prompt) of every outcome, from the library's forward and its warpers."""
    law, warpers = {}, [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for outcome in itertools.product(range(V), repeat=LENGTH):
        logits = PLAIN(torch.tensor([[*PROMPT, *outcome]])).logits[0, len(PROMPT) - 1 : -1]
        for warper in warpers:
            logits = warper(None, logits)
        logs = logits.log_softmax(-1)
        law[outcome] = math.exp(sum(float(row[token]) for row, token in zip(logs, outcome, strict=True)))
    assert math.isclose(sum(law.values()), 1.0)
    return law


def distance(outcomes, law):
    """The chi-square statistic's distance from its mean, in standard deviations; rare cells are pooled."""
    counts, total = Counter(outcomes), len(outcomes)
    assert not any(counts[outcome] for outcome, p in law.items() if not p), "a text that the law rules out"
    cells = [(counts[outcome], total * p) for outcome, p in law.items() if p]
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    if rare:
        cells.append((sum(seen for seen, _ in rare), sum(expected for _, expected in rare)))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    return (statistic - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


def sampled(drafter, target, planner="full", samples=SAMPLES, **fields):
    llm = LLM(target, drafter, planner, seed=0)
    results = llm.generate([PROMPT] * samples, SamplingParams(max_tokens=LENGTH + 2, **fields))
    accepted = sum(result.statistics.accepted for result in results)
    assert accepted > samples / 10, "hardly anything accepted: the test says nothing"
    return [tuple(result.token_ids[:LENGTH]) for result in results]


@pytest.mark.parametrize("kind", [*SHAPES, "draft_model", "ngram"])
def test_samples_follow_the_targets_joint_law(kind):
    target, samples = target_of(5), SAMPLES if kind == "dspark" else SAMPLES // 2
    assert distance(sampled(drafter_of(kind, target), target, samples=samples), exact_law()) < BOUND


class Trusting(Guard):
    """Believes the prices, whatever the steps of a model this small take."""

    def allows(self, requests):
        return True

    def observe(self, outcome, prices, *, booked=True):
        pass


@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_samples_under_the_default_planner_do_too(acceptance, monkeypatch):
    """`auto` is `joint` for any target worth measuring; some steps follow its choice without asking it."""
    target, followed = target_of(5), Counter()
    observe = Following.observe
    monkeypatch.setattr(Following, "observe", lambda *step: (followed.update(["steps"]), observe(*step))[1])
    planner = parse_planner("joint", StepCost(rows=(1, 512), seconds=(1e-3, 2e-3)))
    planner.guard = Trusting()
    assert distance(sampled(drafter_of("dspark", target), target, planner, acceptance=acceptance), exact_law()) < BOUND
    assert followed["steps"] > 20


@pytest.mark.skipif(not load_kernels(), reason="no C++ compiler: the rounds of float32 run like those of float64")
@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7}, {"temperature": 0.8, "top_k": 4, "top_p": 0.8}], ids=str)
def test_samples_through_the_round_kernels_do_too(fields, acceptance, monkeypatch):
    """float32 on a CPU draws blocks and judges rounds in kernels, as a user's model does; this is that path."""
    calls = Counter()

    def counted(name, kernel):
        def call(*arguments):
            calls[name] += 1
            return kernel(*arguments)

        return call

    monkeypatch.setattr(verify, "verdict", counted("verdict", verify.verdict))
    monkeypatch.setattr(dspark, "draft_chain", counted("draft_chain", dspark.draft_chain))
    target = target_of(5, torch.float32)
    drafter = drafter_of("dspark", target)
    drafter.pack()
    assert distance(sampled(drafter, target, acceptance=acceptance, **fields), exact_law(**fields)) < BOUND
    assert calls["verdict"] and calls["draft_chain"]


@pytest.mark.skipif(not load_kernels(), reason="no C++ compiler: the rounds of float32 run like those of float64")
def test_samples_of_both_rules_side_by_side_do_too():
    """Some of them with a bias of 0, which leaves the law as it is, but is not left out."""
    target = target_of(5, torch.float32)
    drafter = drafter_of("dspark", target)
    drafter.pack()
    llm = LLM(target, drafter, "full", seed=0)
    kinds = [
        {"acceptance": rule} | bias for rule in ("rejection", "coupled") for bias in ({}, {"logit_bias": {0: 0.0}})
    ]
    params = [SamplingParams(max_tokens=LENGTH + 2, **kinds[i % 4]) for i in range(2 * SAMPLES)]
    results = llm.generate([PROMPT] * len(params), params)
    texts = [tuple(result.token_ids[:LENGTH]) for result in results]
    for kind in range(4):
        assert distance(texts[kind::4], exact_law()) < BOUND, kinds[kind]


def test_samples_of_the_coupled_rule_do_too():
    target = target_of(5)
    assert distance(sampled(drafter_of("dspark", target), target, acceptance="coupled"), exact_law()) < BOUND


class Telling:
    """A drafter whose second confidence tells what the first drafted token was; legal by itself."""

    def __init__(self, drafter):
        self.drafter = drafter
        self.block_size, self.taps = drafter.block_size, drafter.taps
        self.allocate, self.extend = drafter.allocate, drafter.extend

    def propose(self, context):
        draft = self.drafter.propose(context)
        confidence_RK = torch.full_like(draft.confidence_RK, 0.8)
        confidence_RK[:, 1:] = 0.9 * (draft.token_RK[:, :1] < V // 2)
        return replace(draft, confidence_RK=confidence_RK)


class Peeking:
    """Verifies all or nothing, by the whole block's survival: slot 1's fate depends on the token in it."""

    def slots(self, round):
        return list(round.limit_R)

    def plan(self, round, survival_RK):
        if survival_RK is None:
            return [0] * round.requests
        return [limit if row[-1] > 0 else 0 for row, limit in zip(survival_RK.tolist(), round.limit_R, strict=True)]

    def observe(self, outcome):
        pass


class Ending:
    """Ends the block of the requests of a step, and cuts their plans, by what was drafted before each slot."""

    ended = 0

    def slots(self, round):
        return list(round.limit_R)

    def going_on(self, round, survival_R, drawn):
        stays = float(survival_R.sum()) > 0.45 * len(survival_R)
        self.ended += not stays
        return stays

    def plan(self, round, survival_RK):
        return [0] * round.requests if survival_RK is None else parse_planner("threshold:0.4").plan(round, survival_RK)

    def observe(self, outcome):
        pass


@pytest.mark.parametrize("kind", ["eagle3", "layer_skip"])
def test_blocks_that_end_early_keep_the_law(kind):
    target, planner = target_of(5), Ending()
    llm = LLM(target, drafter_of(kind, target), planner, seed=0, max_running=4)
    results = llm.generate([PROMPT] * (SAMPLES // 4), SamplingParams(max_tokens=LENGTH + 2))
    assert planner.ended > 50
    assert distance([tuple(result.token_ids[:LENGTH]) for result in results], exact_law()) < BOUND


@pytest.mark.parametrize(("planner", "caught"), [("threshold:0.85", False), (Peeking(), True)])
def test_a_plan_that_peeks_is_caught(planner, caught):
    target = target_of(5)
    drafter = Telling(drafter_of("dspark", target))
    llm = LLM(target, drafter, planner, seed=0)
    results = llm.generate([PROMPT] * SAMPLES, SamplingParams(max_tokens=LENGTH + 2))
    found = distance([tuple(result.token_ids[:LENGTH]) for result in results], exact_law())
    assert found > 3 * BOUND if caught else found < BOUND


@pytest.mark.parametrize("planner", ["full", "fixed:2", "threshold:0.5"])
@pytest.mark.parametrize(
    "fields",
    [
        {"acceptance": "rejection"},
        {"acceptance": "rejection", "temperature": 0.7, "top_p": 0.9},
        {"acceptance": "rejection", "temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"acceptance": "coupled", "min_p": 0.1, "logit_bias": {2: 0.7}},
        {"temperature": 0.0, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_the_engine_equals_the_reference_loop(fields, planner):
    """Same numbers, same text, under the rejection rule as well; the engine's first round never drafts."""
    target, planning = target_of(5), parse_planner(planner)
    llm = LLM(target, drafter_of("draft_model", target), planner, max_step_tokens=40)
    each = [SamplingParams(max_tokens=14, seed=10 + i, **fields) for i in range(3)]
    prompts = [PROMPT, [2], [0, 1] * 4]
    for prompt, params, result in zip(prompts, each, llm.generate(prompts, each), strict=True):
        plan = plan_of(planning, itertools.count())
        wanted = reference.generate(
            prompt, lambda tokens: logits(PLAIN, tokens), propose, plan, params, slots=3, seed=params.seed
        )
        assert result.token_ids == wanted
