"""Self-play writes what the target says, marks it, and stops at the end token."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.demo.selfplay import Prompts, self_play
from dspark.engine.config import EngineConfig
from dspark.engine.step import EngineCore
from dspark.models.target import Target
from dspark.training.data import Documents, write_documents

VOCABULARY = 31


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("target")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3}
    config = Qwen3Config(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, **heads)
    Qwen3ForCausalLM(config).save_pretrained(path)
    return Target.load(path, dtype="float32", device="cpu")


def play(target, rows):
    stream = np.array(([0, *range(1, 30)] * 20), dtype=np.uint16)
    prompts = Prompts(stream, np.arange(VOCABULARY) % 7 == 0, 0, 20, seed=1)
    core = EngineCore(target, config=EngineConfig(max_running=rows, prefix_caching=False, seed=5), eos_token_ids=[0])
    return list(self_play(core, prompts, tokens=300, new_tokens=24, seed=3))


def test_documents_and_their_masks(target, tmp_path):
    documents = play(target, 6)
    assert sum(sum(mask) for _, mask in documents) >= 300
    for ids, mask in documents:
        prompt = mask.index(1)
        assert ids[0] == 0 and 9 <= prompt <= 20
        assert ids[1:prompt] == list(range(ids[1], ids[1] + prompt - 1))  # a piece of the corpus
        assert all(mask[prompt:]) and 0 not in ids[prompt:-1]
        assert len(ids) - prompt == 24 or ids[-1] == 0
    write_documents(tmp_path / "d", documents, vocabulary=VOCABULARY)
    assert len(Documents(tmp_path / "d", 64)) == sum(sum(mask) > 1 for _, mask in documents)  # one has no label


def test_the_text_does_not_depend_on_how_many_are_written_at_once(target):
    assert play(target, 6) == play(target, 2)
