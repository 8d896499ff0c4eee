"""The meter: what a step did and took, as a cost model reads it."""

from engines import CONTEXT, drain, engine, prompts

from dspark.common.sampling_params import SamplingParams

SLOTS = 3


def test_every_step_is_metered_with_its_rows_context_and_drafts():
    core = engine("dspark", f"fixed:{SLOTS}", max_step_tokens=16)
    steps = []
    core.meter = steps.append
    lengths = (20, 3)
    for prompt in prompts(lengths):
        core.add(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
    drain(core)
    assert len(steps) == core.timings.steps
    assert sum(step.prefill for step in steps) == sum(lengths) - len(lengths)  # each prompt's last row has logits
    assert (steps[0].rows, steps[0].requests, steps[0].prefill, steps[0].context) == (0, 0, 16, 0)
    full = [step for step in steps if step.drafting == 2]
    assert full and all(step.slots <= SLOTS and step.rows <= 2 * (1 + SLOTS) for step in full)
    assert all(step.requests <= step.rows and step.context <= 2 * CONTEXT for step in steps)
    assert all(0 <= step.draft_seconds <= step.seconds for step in steps)
    assert sum(step.seconds for step in steps) == core.timings.total
