"""A whole engine with grammars: sampled texts follow the target's law among allowed tokens, whatever drafts for it."""

import itertools
import math
from collections import Counter

import pytest
import torch
from test_engine_law import BOUND, PLAIN, PROMPT, distance, drafter_of, logits, plan_of, propose, target_of
from toy_grammar import WORDS, Automata, Automaton

from dspark.common.grammar import Grammar
from dspark.common.sampling_params import SamplingParams
from dspark.drafters import dspark
from dspark.engine.llm import LLM
from dspark.ops.cpu import load_kernels
from dspark.speculation import reference, verify
from dspark.speculation.planner import parse_planner

LENGTH, SAMPLES = 3, 1500
ANY = Grammar.regex("stands for the automaton")


@torch.no_grad()
def exact_law():
    """P(x1, x2, x3 | prompt) of every text of the grammar, one that ends early at its end."""
    law = {}
    for outcome in itertools.product(range(4), repeat=LENGTH):
        text, chance = Automaton(WORDS), 1.0
        logits = PLAIN(torch.tensor([[*PROMPT, *outcome]])).logits[0, len(PROMPT) - 1 : -1]
        taken = []
        for row, token in zip(logits, outcome, strict=True):
            allowed = torch.from_numpy(text.allowed())
            if not allowed[token]:
                break
            chance *= float(row.masked_fill(~allowed, -torch.inf).softmax(-1)[token])
            text.advance(token)
            taken.append(token)
            if text.complete:
                break
        else:
            law[outcome] = chance
            continue
        if text.complete:
            law[tuple(taken)] = chance
    assert math.isclose(sum(law.values()), 1.0)
    return law


def guided(kind, planner="full", **options):
    target = target_of(5)
    llm = LLM(target, drafter_of(kind, target) if kind else None, planner, seed=0, **options)
    llm.core.intake.grammars = Automata()
    return llm


@pytest.mark.parametrize(("kind", "rule"), [("dspark", "rejection"), ("ngram", "rejection"), ("eagle3", "coupled")])
def test_samples_follow_the_law(kind, rule):
    llm = guided(kind)
    results = llm.generate([PROMPT] * SAMPLES, SamplingParams(max_tokens=LENGTH + 2, acceptance=rule, grammar=ANY))
    assert sum(result.statistics.accepted for result in results) > SAMPLES / 10
    assert distance([tuple(result.token_ids[:LENGTH]) for result in results], exact_law()) < BOUND
    for result, made in zip(results, llm.core.intake.grammars.made, strict=True):
        assert made.states == Automaton(WORDS, result.token_ids).states, "a draft was not taken back"
        assert made.complete == (result.finish_reason == "stop")


@pytest.mark.skipif(not load_kernels(), reason="no C++ compiler: the rounds of float32 run like those of float64")
@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_samples_through_the_kernels_do_too(rule, monkeypatch):
    """float32 on a CPU, as users have it: every slot is masked, then drawn in a kernel; the round is judged in one."""
    calls = Counter()

    def count(module, name):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (calls.update([name]), kernel(*given))[1])

    count(verify, "verdict")
    count(dspark, "draft_chain")
    target = target_of(5, torch.float32)
    drafter = drafter_of("dspark", target)
    drafter.pack()
    llm = LLM(target, drafter, "full", seed=0)
    llm.core.intake.grammars = Automata()
    results = llm.generate([PROMPT] * SAMPLES, SamplingParams(max_tokens=LENGTH + 2, acceptance=rule, grammar=ANY))
    assert sum(result.statistics.accepted for result in results) > SAMPLES / 10
    assert distance([tuple(result.token_ids[:LENGTH]) for result in results], exact_law()) < BOUND
    assert calls["draft_chain"] > calls["verdict"] > 0


@pytest.mark.parametrize(
    "fields", [{"seed": 3}, {"temperature": 0}, {"seed": 4, "top_p": 0.8, "presence_penalty": 0.5}]
)
def test_the_text_is_the_same_whoever_drafts_preempted_or_not(fields):
    params = [SamplingParams(max_tokens=20, grammar=ANY if i % 2 else None, **fields) for i in range(6)]
    prompts = [PROMPT, [2], [0, 1] * 4] * 2
    want = [result.token_ids for result in guided(None).generate(prompts, params)]
    for kind, options in (("dspark", {}), ("ngram", {}), ("draft_model", {"pages": 12, "page_size": 4})):
        llm = guided(kind, **options)
        results = llm.generate(prompts, params)
        assert [result.token_ids for result in results] == want, kind
        llm.core.check_integrity()
    assert sum(result.statistics.preemptions for result in results), "nobody was preempted: the test says less"


def allowed(output):
    """The automaton as the oracle asks it."""
    text = Automaton(WORDS, output)
    return None if text.complete else torch.from_numpy(text.allowed())


@pytest.mark.parametrize("planner", ["full", "fixed:2", "threshold:0.6"])
@pytest.mark.parametrize(
    "fields",
    [
        {"acceptance": "rejection"},
        {"acceptance": "rejection", "temperature": 0.7, "top_p": 0.9},
        {"acceptance": "rejection", "temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"acceptance": "coupled", "min_p": 0.1, "logit_bias": {1: 0.7, 3: 1.2}},
        {"temperature": 0.0, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_the_engine_with_a_grammar_equals_the_reference_loop(fields, planner):
    """The same text and the same rounds, beside requests without a grammar; the engine's first round never drafts."""
    planning = parse_planner(planner)
    shared = {"max_tokens": 14, "logit_bias": {1: 1.0, 3: 2.0}} | fields  # so that texts come to their end
    params = [SamplingParams(seed=seed, grammar=ANY if seed % 2 else None, **shared) for seed in range(12)]
    prompts = [PROMPT, [2], [0, 1] * 4] * 4
    results = guided("draft_model", planner).generate(prompts, params)
    for prompt, own, result in zip(prompts, params, results, strict=True):
        rounds = itertools.count()
        grammar = {"allowed": allowed} if own.grammar else {}
        arguments = (prompt, lambda tokens: logits(PLAIN, tokens), propose, plan_of(planning, rounds), own)
        assert result.token_ids == reference.generate(*arguments, slots=3, seed=own.seed, **grammar)
        assert result.statistics.rounds == next(rounds) - 1
    ended = [result.finish_reason for result, own in zip(results, params, strict=True) if own.grammar]
    assert "stop" in ended and sum(result.statistics.accepted for result in results) > 5


def test_a_step_without_grammars_pays_nothing(monkeypatch):
    llm = guided("dspark")
    monkeypatch.setattr("dspark.engine.laws.Guide", lambda _: pytest.fail("a guide was made"))
    assert llm.generate(PROMPT, SamplingParams(max_tokens=5))[0].finish_reason == "length"
