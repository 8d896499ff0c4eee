"""With a grammar the committed tokens have the target's own law among the allowed ones, exactly, in every combination.

What could break it: masking the draw but not the law that is reported, or cutting a draft because of the token drawn.
Both are tried, and caught.
"""

from dataclasses import replace

import pytest
import torch
from exact import System, joint_law, propose
from test_exact_rejection import TRUNCATIONS, difference
from tiny_world import DRAFTERS, PLANNER_NAMES, PROMPT, MarkovDrafter, V, plain_law, target_logits
from toy_grammar import WORDS, Automaton
from two_requests import CUTS, CoupledPair, Pair, distance
from two_requests import TARGET_VV as PAIR_VV

from dspark.common.sampling_params import SamplingParams
from dspark.ops.sampling import Shaping
from dspark.speculation.draft_sampler import DraftSampler
from dspark.speculation.grammar import CERTAIN, Guide
from dspark.speculation.planner import parse_planner

LENGTH = 3


def matcher(output):
    return Automaton(WORDS, output)


def expected(params, length=LENGTH):
    """The target's own joint law among allowed tokens, by the chain rule; past its end a text repeats it."""
    law = {(): 1.0}
    for _ in range(length):
        longer = {}
        for output, before in law.items():
            logits = target_logits([*PROMPT, *output]).clone()
            logits[~torch.from_numpy(matcher(output).allowed())] = -torch.inf
            for v, p in enumerate(plain_law(logits, params, PROMPT, output)):
                if p:
                    longer[(*output, v)] = before * p
        law = longer
    return law


class Stray(MarkovDrafter):
    """Draws without looking at the grammar, and says so."""

    def propose(self, committed, sampler, slots):
        return super().propose(committed, DraftSampler(sampler.shaping, sampler.noise, sampler.history), slots)


GUIDED = DRAFTERS | {"stray": Stray()}


def system_of(drafter, planner="full", params=None, **changes):
    params = params or SamplingParams()
    return System(target_logits, drafter, parse_planner(planner), params, prompt=PROMPT, matcher=matcher, **changes)


@pytest.mark.parametrize("planner", PLANNER_NAMES)
@pytest.mark.parametrize("drafter", GUIDED)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_three_tokens_have_the_targets_law_among_allowed_ones(drafter, planner, temperature):
    for truncation in TRUNCATIONS if planner == "full" else ("none", "penalties"):
        params = SamplingParams(temperature=temperature, **TRUNCATIONS[truncation])
        found = joint_law(system_of(GUIDED[drafter], planner, params), LENGTH)
        assert difference(found, expected(params)) < 1e-12, truncation


def test_drafts_are_allowed_and_end_with_the_text():
    system = system_of(MarkovDrafter(), slots=4)
    uniforms = torch.rand(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    draft = propose(system, [], uniforms)
    forced = 0
    for r, length in enumerate(draft.length_R):
        text = Automaton(WORDS)
        for k, token in enumerate(draft.token_RK[r, :length].tolist()):
            allowed = text.allowed()
            assert allowed[token] and not text.complete
            assert not float(draft.probability_RKV[r, k][~torch.from_numpy(allowed)].sum())
            assert (float(draft.confidence_RK[r, k]) == pytest.approx(CERTAIN)) == (allowed.sum() == 1)
            forced += allowed.sum() == 1
            text.advance(token)
        assert length == 4 or text.complete
    assert forced > 20 and min(draft.length_R) < 4


class Liar(MarkovDrafter):
    """Its draws obey the grammar; the laws that it reports do not."""

    def propose(self, committed, sampler, slots):
        draft = super().propose(committed, sampler, slots)
        laws = torch.stack(
            [
                torch.stack([self.logits(tokens, row[:k]).softmax(-1) for k in range(slots)])
                for tokens, row in zip(committed, draft.token_RK.tolist(), strict=True)
            ]
        )
        return replace(draft, probability_RKV=laws)


class Cutting(Guide):
    """Cuts a draft at every token that is not allowed, though its law was not certain of it."""

    def follow(self, draft):
        certain = torch.nn.functional.one_hot(draft.token_RK, V).to(draft.probability_RKV.dtype)
        cut = super().follow(replace(draft, probability_RKV=certain))
        return replace(cut, probability_RKV=draft.probability_RKV)


def test_a_law_that_is_not_the_drafts_is_caught():
    with pytest.raises(AssertionError, match="inside a piece"):
        joint_law(system_of(Liar()), 1)


def test_a_cut_that_peeks_is_caught():
    found = joint_law(system_of(Stray(), guide=Cutting), 1)
    assert difference(found, expected(SamplingParams(), 1)) > 1e-3


PAIRED = {"start": {0: "a", 1: "b"}, "a": {1: "b"}, "b": {0: "start", 1: "b"}}


class GuidedPair(Pair):
    """Two requests with a grammar under one planner: after a 0 comes a 1."""

    def system(self, request):
        return replace(super().system(request), matcher=lambda output: Automaton(PAIRED, output, 2))


class GuidedCoupledPair(GuidedPair, CoupledPair):
    def _block(self, request, text):
        key = (request, text)
        if key not in self._blocks:
            noise, system = self._noise(), self.system(request)
            guide = Guide([system.matcher(text) for _ in noise.seeds])
            sampler = DraftSampler(Shaping.of([SamplingParams()] * len(noise.seeds)), noise, None, guide)
            draft = self.drafter.propose([[*system.prompt, *text]] * len(noise.seeds), sampler, self.slots)
            self._blocks[key] = guide.follow(draft)
        return self._blocks[key]


def pair_law():
    p_VV = PAIR_VV.softmax(-1)

    def each(start, first, second):
        return float(p_VV[start, first]) * (float(second) if first == 0 else float(p_VV[first, second]))

    words = [(a, b) for a in (0, 1) for b in (0, 1)]
    return {(x, y): each(0, *x) * each(1, *y) for x in words for y in words}


@pytest.mark.parametrize("pair", [GuidedPair, GuidedCoupledPair])
@pytest.mark.parametrize("planner", ["full", "threshold:0.6", "fixed:1"])
def test_two_requests_under_both_rules(pair, planner):
    assert len(CUTS) > 4
    assert distance(pair(parse_planner(planner)).law(), pair_law()) < 1e-12
