"""Join, leave, cancel and starve at random: every page is accounted for after every step, and no text changes."""

import itertools
import random

import pytest
from engines import DRAFTERS, engine, plain, prompts

from dspark.common.sampling_params import SamplingParams
from dspark.speculation import statistics

PROMPTS = [*prompts((5, 11, 19)), *(2 * prompts((8, 16))[i] for i in (0, 1))]
COUNT = 26
WANTED = {}
PREEMPTIONS = []


def wanted(index):
    if index not in WANTED:
        WANTED[index] = plain(PROMPTS[index], COUNT)
    return WANTED[index]


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_events(seed):
    rng = random.Random(seed)
    core = engine(
        DRAFTERS[seed % len(DRAFTERS)],
        rng.choice(["full", "fixed:1", "threshold:0.5"]),
        pages=rng.randrange(16, 20),
        max_step_tokens=rng.choice([3, 8, 64]),
        max_running=rng.choice([2, 5, 50]),
        prefix_caching=rng.random() < 0.7,
    )
    alive, done = {}, 0
    for step in itertools.count():
        for _ in range(rng.randrange(3) if step < 16 else 0):
            index, count = rng.randrange(len(PROMPTS)), rng.randrange(8, COUNT + 1)
            fields = {"temperature": 0} if rng.random() < 0.7 else {"temperature": 1, "seed": step}
            request_id = core.add(PROMPTS[index], SamplingParams(max_tokens=count, **fields))
            alive[request_id] = (index, count, fields["temperature"], [])
        if alive and rng.random() < 0.1:
            victim = rng.choice(list(alive))
            assert core.cancel(victim).finish_reason == "cancelled"
            assert core.cancel(victim) is None
            del alive[victim]
            core.check_integrity()
        for commit in core.step():
            index, count, temperature, tokens = alive[commit.request_id]
            tokens += commit.token_ids
            assert commit.token_ids and len(tokens) <= count
            if temperature == 0:
                assert tokens == wanted(index)[: len(tokens)]
            if commit.finish_reason:
                assert len(tokens) == count
                del alive[commit.request_id]
                done += 1
                PREEMPTIONS.append(commit.statistics.preemptions)
        core.check_integrity()
        assert bool(alive) != core.idle
        if step > 16 and core.idle:
            break
    assert done and core.admission.pool.available == core.admission.pool.capacity


def test_there_was_something_to_survive():
    assert len(PREEMPTIONS) > 60 and sum(PREEMPTIONS) > 5


def test_cancel_everywhere_frees_everything():
    """Waiting, in the middle of a prefill, decoding, preempted: the pool is whole again."""
    for steps in range(8):
        core = engine("dspark", pages=14, max_step_tokens=9)
        ids = [core.add(prompt, SamplingParams(max_tokens=20, temperature=0)) for prompt in PROMPTS]
        for _ in range(steps):
            core.step()
        for request_id in ids:
            core.cancel(request_id)
            core.check_integrity()
        assert core.idle and core.admission.pool.available == 13
        assert core.step() == []


def test_the_oldest_is_never_preempted_and_everyone_finishes():
    core = engine("none", pages=16, prefix_caching=False)
    ids = [core.add(prompt, SamplingParams(max_tokens=25, temperature=0)) for prompt in PROMPTS]
    finished = {}
    while not core.idle:
        for commit in core.step():
            if commit.finish_reason:
                finished[commit.request_id] = commit.statistics
    assert next(iter(finished)) == ids[0] and set(finished) == set(ids)
    assert finished[ids[0]].preemptions == 0 < sum(s.preemptions for s in finished.values())
    assert statistics.total(finished.values()).tokens_per_round == 1.0
