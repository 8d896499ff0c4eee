"""The blocking interface on a directory: prompts in any form, chat, results, bad input."""

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from engines import config, plain
from transformers import Qwen3ForCausalLM

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.draft_model import DraftModel
from dspark.drafters.ngram import NoDraft
from dspark.engine.llm import LLM

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)
GREEDY = SamplingParams(max_tokens=10, temperature=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    model = Qwen3ForCausalLM._from_config(config(), dtype=torch.float64)
    model.save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(directory):
    return LLM(directory, directory, tokenizer=None)  # its own draft model


def test_prompts_in_every_form(llm):
    ids = llm.tokenizer("abc d")["input_ids"]
    wanted = plain(ids, 10)
    assert isinstance(llm.core.drafter, DraftModel)
    for prompt in ("abc d", ids, ["abc d"], [ids]):
        (result,) = llm.generate(prompt, GREEDY)
        assert result.token_ids == wanted
        assert result.text == llm.tokenizer.decode(wanted).rstrip("�")
        assert result.finish_reason == "length" and result.logprobs is None
        assert result.statistics.tokens_per_round > 2
    assert llm.generate([], GREEDY) == []


def test_parameters_for_all_or_for_each(llm):
    each = [SamplingParams(max_tokens=n, temperature=0, logprobs=1) for n in (2, 5)]
    results = llm.generate(["ab", "ab"], each)
    assert [len(result.token_ids) for result in results] == [2, 5] == [len(result.logprobs) for result in results]
    assert results[1].token_ids[:2] == results[0].token_ids
    assert len(llm.generate("ab", SamplingParams(max_tokens=3))[0].token_ids) == 3
    with pytest.raises(UserError, match="2 prompts but 1 sampling"):
        llm.generate(["a", "b"], each[:1])


def test_chat_renders_the_template(llm):
    with pytest.raises(UserError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])
    llm.tokenizer.chat_template = TEMPLATE
    wanted = llm.generate("user: hi bot:", GREEDY)[0].token_ids
    message = {"role": "user", "content": "hi"}
    assert llm.chat([message], GREEDY)[0].token_ids == wanted
    assert [result.token_ids for result in llm.chat([[message], [message]], GREEDY)] == [wanted, wanted]
    for bad, words in (([], "no messages"), ([{"content": "x"}], "message 0")):
        with pytest.raises(UserError, match=words):
            llm.chat(bad)


def test_stream_joins_to_the_result_and_cancels(llm):
    (result,) = llm.generate("abc d", GREEDY)
    commits = list(llm.stream("abc d", GREEDY))
    assert "".join(commit.text for commit in commits) == result.text
    assert commits[-1].finish_reason == "length"
    for _ in llm.stream("abc d", GREEDY):
        break
    assert llm.core.idle
    llm.core.check_integrity()


def test_streams_and_batches_interleave(llm):
    wanted = [result.token_ids for result in llm.generate(["abc d", "b"], GREEDY)]
    first, second = llm.stream("abc d", GREEDY), llm.stream("b", GREEDY)
    tokens = [[*next(first).token_ids], [*next(second).token_ids]]
    assert llm.generate("abc d", GREEDY)[0].token_ids == wanted[0]
    for index, stream in enumerate((first, second)):
        tokens[index] += [token for commit in stream for token in commit.token_ids]
    assert tokens == wanted
    assert llm.core.idle


def test_one_bad_prompt_leaves_nothing_behind(llm):
    with pytest.raises(UserError, match="prompt is empty"):
        llm.generate(["ab", ""], GREEDY)
    assert llm.core.idle


def test_auto_finds_a_drafter_beside_the_target(directory, tmp_path):
    assert isinstance(LLM(directory).core.drafter, NoDraft)
    (directory / "drafter").symlink_to(directory)
    try:
        assert isinstance(LLM(directory).core.drafter, DraftModel)
    finally:
        (directory / "drafter").unlink()
    assert isinstance(LLM(directory, drafter=None).core.drafter, NoDraft)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"page_sise": 1}, "did you mean page_size"),
        ({"planner": "best"}, "planner 'best'"),
        ({"dtype": "f8"}, "dtype 'f8'"),
    ],
)
def test_options_are_checked(directory, options, words):
    with pytest.raises(UserError, match=words):
        LLM(directory, **options)
