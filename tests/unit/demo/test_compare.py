"""The demo's judgement: texts are the same only if every run's tokens are, and a difference is found and shown."""

import torch

from dspark.common.sampling_params import SamplingParams
from dspark.demo.compare import Outcome, Tally, first_difference, measure
from dspark.demo.race import Lane, race
from dspark.demo.terminal import difference_lines, last_line
from dspark.drafters.registry import load_drafter
from dspark.models.target import Target

PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def lanes(pair):
    target = Target.load(pair.target, device="cpu")
    return Lane(target, None, "none", compile=False), Lane(
        target, load_drafter(pair.drafter, target), "full", compile=False
    )


def test_race_lets_the_lane_behind_go_on(tiny_pair):
    plain, dspark = lanes(tiny_pair)
    for lane in race([plain, dspark], "def", PARAMS):
        other = dspark if lane is plain else plain
        assert lane.done or other.done or lane.written
    assert plain.result().token_ids == dspark.result().token_ids
    assert len(plain.written) == 12 and not any(token.accepted for token in plain.written)
    assert sum(token.accepted for token in dspark.written) == dspark.statistics.accepted
    assert "".join(t.text for t in plain.written) == "".join(t.text for t in dspark.written)


def test_a_text_that_differs_is_not_called_the_same(tiny_pair):
    plain, dspark = lanes(tiny_pair)
    outcome = Outcome("def", [], [], [])
    list(measure(plain, dspark, [outcome], PARAMS, rounds=2))
    tally = Tally([outcome])
    assert len(outcome.plain) == len(outcome.dspark) == 2
    assert tally.same and last_line(tally).endswith("same text: yes")
    assert first_difference(plain, dspark, [outcome], PARAMS) is None
    head = dspark.core.target.model.get_output_embeddings()
    plain.core.target.model.set_output_embeddings(_Shifted(head))
    outcome.plain.append(plain.run("def", PARAMS))
    assert not tally.same and last_line(tally).endswith("same text: no")


def test_the_first_difference_names_both_tokens(tiny_pair):
    plain, _ = lanes(tiny_pair)
    _, dspark = lanes(tiny_pair)
    model = plain.core.target.model
    model.set_output_embeddings(_Shifted(model.get_output_embeddings()))
    outcome = Outcome("def", [], [plain.run("def", PARAMS)], [dspark.run("def", PARAMS)])
    difference = first_difference(plain, dspark, [outcome], PARAMS)
    assert difference is not None and difference.position == 0 and difference.plain[0] != difference.dspark[0]
    lines = difference_lines(difference, "DSpark")
    assert "token 1" in lines[0] and repr(difference.plain[0][0]) in lines[1] and len(lines) == 3


class _Shifted(torch.nn.Module):
    """An LM head whose every row has moved by one: other tokens win."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden).roll(1, dims=-1)
