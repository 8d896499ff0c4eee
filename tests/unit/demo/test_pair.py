"""The embedded pair: small, whole, and a drafter that fits its target."""

from pathlib import Path

import pytest

from dspark import SamplingParams
from dspark.demo.pair import demo_drafter_path, demo_target_path
from dspark.demo.prompts import PROMPTS
from dspark.engine.llm import LLM

MEGABYTE = 1 << 20


def test_it_is_small():
    files = [*demo_target_path().iterdir(), *demo_drafter_path().iterdir()]
    assert sum(file.stat().st_size for file in files) <= 48 * MEGABYTE


@pytest.mark.parametrize("seed", [None, 1])
def test_it_writes_the_same_text_with_and_without_its_drafter(seed):
    params = SamplingParams(max_tokens=24, temperature=0 if seed is None else 1, seed=seed)
    texts = []
    for drafter in ("none", demo_drafter_path()):
        llm = LLM(demo_target_path(), drafter, "full", compile=False)
        results = [llm.generate(prompt, params)[0] for prompt in PROMPTS]
        texts.append([result.token_ids for result in results])
        drafted = sum(result.statistics.accepted for result in results)
        assert (drafted > 20) == isinstance(drafter, Path), "a drafter that fits is often right"
    assert texts[0] == texts[1]
