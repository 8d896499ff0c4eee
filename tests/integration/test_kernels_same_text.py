"""The embedded pair by the CPU kernels: speculation, batches and threads leave the text as it is, to the token."""

import pytest
import torch

from dspark.common.sampling_params import SamplingParams
from dspark.demo.pair import demo_drafter_path, demo_target_path
from dspark.demo.prompts import PROMPTS
from dspark.engine.build import build_engine
from dspark.ops.cpu import load_kernels

pytestmark = pytest.mark.skipif(not load_kernels(), reason="no C++ compiler: everything runs eagerly")
COUNT = 16


@pytest.fixture(scope="module")
def engines():
    cores = [build_engine(demo_target_path(), drafter, "full") for drafter in (None, demo_drafter_path())]
    for core in cores:
        assert core.graphs and all(graph.native for graph in core.graphs)
    return cores


def texts(core, params, *, together):
    groups = [PROMPTS[:3]] if together else [[prompt] for prompt in PROMPTS[:3]]
    written = {}
    for group in groups:
        ids = [core.add(prompt, params) for prompt in group]
        written |= {id: [] for id in ids}
        while not core.idle:
            for commit in core.step():
                written[commit.request_id] += commit.token_ids
    return list(written.values())


def test_nobody_else_changes_a_seeded_text(engines):
    """Beside requests whose laws are made otherwise: those go their own way through the round."""
    own = SamplingParams(max_tokens=COUNT, ignore_eos=True, temperature=0.8, seed=5)
    others = [
        SamplingParams(max_tokens=COUNT, ignore_eos=True, seed=7, top_p=0.8),
        SamplingParams(max_tokens=COUNT, ignore_eos=True, temperature=1.0, frequency_penalty=0.4),
        SamplingParams(max_tokens=COUNT, ignore_eos=True, temperature=1.0, acceptance="rejection"),
    ]
    for core in engines:
        wanted = texts(core, own, together=False)[0]
        ids = [core.add(PROMPTS[0], params) for params in [*others[:2], own, others[2]]]
        written = {id: [] for id in ids}
        while not core.idle:
            for commit in core.step():
                written[commit.request_id] += commit.token_ids
        assert written[ids[2]] == wanted and all(len(text) == COUNT for text in written.values())
        assert written[ids[0]] == texts(core, others[0], together=False)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.0, "seed": 6, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    ],
    ids=["greedy", "seeded", "everything"],
)
def test_nothing_changes_the_text(engines, sampling):
    params = SamplingParams(max_tokens=COUNT, ignore_eos=True, **sampling)
    wanted = texts(engines[0], params, together=False)
    assert texts(engines[1], params, together=False) == wanted
    assert [texts(core, params, together=True) for core in engines] == [wanted, wanted]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert texts(engines[1], params, together=True) == wanted
    finally:
        torch.set_num_threads(before)
