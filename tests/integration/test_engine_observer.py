"""An observer sees every drafting round of every request, as the statistics count them."""

import pytest
from engines import engine, prompts, run

from dspark.speculation.reliability import conditional_samples


@pytest.mark.parametrize(("kind", "planner"), [("dspark", "full"), ("dspark", "threshold:0.5"), ("ngram", "full")])
def test_records_are_what_was_counted(kind, planner):
    core, seen = engine(kind, planner), []
    core.observer = seen.extend
    run(core, prompts([5, 17, 9]), max_tokens=12, temperature=1.0)
    assert {record.request_id for record in seen} == {0, 1, 2}
    counted = core.statistics
    assert sum(record.verified for record in seen) == counted.verified
    assert sum(record.accepted for record in seen) == counted.accepted
    assert [len(conditional_samples(seen, k)[0]) for k in range(len(counted.reached_at))] == counted.reached_at
    assert all(0 <= c <= 1 for record in seen for c in record.confidence)
    assert all(record.full for record in seen) == (planner == "full")
    assert max(len(record.confidence) for record in seen) == core.drafter.block_size


def test_plain_decoding_has_no_rounds_to_observe():
    core, seen = engine("none"), []
    core.observer = seen.append
    run(core, prompts([5]), max_tokens=6)
    assert not seen
