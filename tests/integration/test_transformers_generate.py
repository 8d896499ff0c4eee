"""`model.generate(custom_generate=Speculative(...))` returns what `generate` returns."""

import pytest
import torch
from engines import config, drafter, plain_model, prompts
from transformers import Qwen3ForCausalLM

from dspark.common.errors import UserError
from dspark.engine.transformers_generate import Speculative


@pytest.mark.parametrize("kind", ["dspark", "draft_model", "none"])
def test_greedy_batch_with_padding_and_eos(kind):
    model, method = plain_model(), Speculative(drafter(kind), page_size=4, pages=60)
    rows = prompts((5, 9))
    input_ids = torch.tensor([[0] * 4 + rows[0], rows[1]])
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    wanted = model.generate(input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for eos in (None, int(wanted[0, 13]), [int(wanted[0, 12]), int(wanted[1, 14])]):
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": eos}
        expected = model.generate(input_ids, **options)
        found = model.generate(input_ids, **options, custom_generate=method)
        assert torch.equal(found, expected)
    assert model.config._attn_implementation == "sdpa"


def test_sampling_follows_torchs_seed_and_repeats_rows():
    model, method = plain_model(), Speculative(drafter("draft_model"), page_size=4, pages=60)
    input_ids = torch.tensor(prompts((6,)))
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 20, "temperature": 0.9, "num_return_sequences": 3}
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model.generate(input_ids, **options, custom_generate=method))
    assert outs[0].shape == (3, 14)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0][0], outs[0][1])
    as_dict = model.generate(input_ids, **options, custom_generate=method, return_dict_in_generate=True)
    assert as_dict.sequences.shape == (3, 14)


def test_the_callers_model_stays_as_it_is_and_its_changes_are_seen():
    model = Qwen3ForCausalLM._from_config(config(), dtype=torch.float32, attn_implementation="sdpa").eval()
    method, input_ids = Speculative("ngram", page_size=4, pages=60), torch.tensor(prompts((6,)))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    options = {"max_new_tokens": 8, "do_sample": False}
    for _ in range(2):
        assert torch.equal(
            model.generate(input_ids, **options, custom_generate=method), model.generate(input_ids, **options)
        )
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
        model.lm_head.weight.data.copy_(model.lm_head.weight.roll(1, 0))
        with torch.no_grad():
            model.lm_head.weight.mul_(1.0)  # as an optimizer's step does, it counts as a change


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_beams": 2}, "num_beams 2"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"max_time": 1.0}, "MaxTimeCriteria"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ],
)
def test_what_would_change_the_text_is_refused(options, word):
    with pytest.raises(UserError, match=word):
        plain_model().generate(
            torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, custom_generate=Speculative(None), **options
        )
