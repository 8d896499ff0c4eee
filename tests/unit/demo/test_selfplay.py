"""Self-play writes what the target says, marks it, and stops at the end token."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.demo.selfplay import Prompts, continuations, sample, self_play
from dspark.models.target import Target
from dspark.training.data import Documents, write_documents

VOCABULARY = 31


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("target")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3}
    config = Qwen3Config(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, **heads)
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def target(directory):
    return Target.load(directory, dtype="float32", device="cpu")


def test_temperature_0_is_the_librarys_greedy_text(directory, target):
    prompts = [[0, 5, 9], [0, 3, 3, 8, 21, 4], [0, 7]]
    written_RT = continuations(target, prompts, torch.zeros(3), 70, torch.Generator())
    model = Qwen3ForCausalLM.from_pretrained(directory)
    for prompt, written in zip(prompts, written_RT.tolist(), strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + written])).logits[0]
        assert logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == written


def test_sampling_follows_the_law():
    logits_RV = torch.tensor([0.5, 0.3, 0.2]).log().expand(30_000, 3)
    half_R = torch.full((30_000,), 0.5)
    drawn_R = sample(logits_RV, half_R, torch.Generator().manual_seed(0))
    share_V = torch.bincount(drawn_R, minlength=3) / 30_000
    torch.testing.assert_close(share_V, torch.tensor([25, 9, 4]) / 38, atol=0.015, rtol=0)
    assert (sample(logits_RV, torch.zeros(30_000), torch.Generator()) == 0).all()


def test_documents_and_their_masks(target, tmp_path):
    stream = np.array(([0, *range(1, 30)] * 20), dtype=np.uint16)
    ends = np.arange(VOCABULARY) % 7 == 0
    prompts = Prompts(stream, ends, 0, 20, seed=1)
    options = {"tokens": 300, "rows": 6, "new_tokens": 24, "threads": 2}
    documents = list(self_play(target, prompts, seed=3, **options))
    again = list(self_play(target, Prompts(stream, ends, 0, 20, seed=1), seed=3, **options))
    assert documents == again
    assert sum(sum(mask) for _, mask in documents) >= 300
    for ids, mask in documents:
        prompt = mask.index(1)
        assert ids[0] == 0 and 9 <= prompt <= 20
        assert ids[1:prompt] == list(range(ids[1], ids[1] + prompt - 1))  # a piece of the corpus
        assert all(mask[prompt:]) and 0 not in ids[prompt:-1]
    write_documents(tmp_path / "d", documents, vocabulary=VOCABULARY)
    assert len(Documents(tmp_path / "d", 64)) == len(documents)
