"""A tiny random pair on disk: a Qwen3 target with its tokenizer, and a DSpark drafter that fits it."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits, most of all beside neighbours

import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dspark.drafters.checkpoint import build, save
from dspark.drafters.config import parse

settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
settings.load_profile("any machine")

TEXTS = ["def add(a, b):\n    return a + b\n", "class Stack:\n    def __init__(self):\n        self.items = []\n"]
END = "<|endoftext|>"


class Pair(NamedTuple):
    target: Path
    drafter: Path


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of some 300 tokens: any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END, "<|mask|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def tiny_config(vocabulary: int, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory) -> Pair:
    directory = tmp_path_factory.mktemp("pair")
    pair = Pair(directory / "target", directory / "drafter")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    target = Qwen3ForCausalLM(tiny_config(len(tokenizer), layers=4))
    target.save_pretrained(pair.target)
    tokenizer.save_pretrained(pair.target)
    fields = tiny_config(len(tokenizer), layers=1).to_dict() | {
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": 4,
        "block_size": 5,
        "mask_token_id": 1,
        "target_layer_ids": [0, 2],
        "num_anchors": 4,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "markov_rank": 8,
        "markov_head_type": "vanilla",
    }
    config = parse(json.loads(json.dumps(fields, default=str)), "config.json")
    weight_VD = target.get_input_embeddings().weight.detach()
    drafter = build(config, weight_VD, weight_VD)
    for parameter in drafter.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    save(drafter, config, pair.drafter)
    return pair


@pytest.fixture
def damaged(tmp_path, tiny_pair):
    """A copy of a part of the pair to damage: `damaged("target")` gives its directory."""
    import shutil

    def copy(part: str) -> Path:
        return Path(shutil.copytree(getattr(tiny_pair, part), tmp_path / part))

    return copy
