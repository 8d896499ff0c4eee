"""A tiny target, and text with a structure that a drafter can learn."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.training.config import TrainConfig, build
from dspark.training.data import write_documents

VOCABULARY = 23


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """A tiny target and text with structure a drafter can learn: numbers that count up."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = Qwen3Config(vocab_size=VOCABULARY, num_hidden_layers=3, max_position_embeddings=64, **shape)
    Qwen3ForCausalLM(config).save_pretrained(root / "target")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("held_out", 8)):
        starts = rng.integers(0, VOCABULARY, count)
        documents = [([int((s + i) % (VOCABULARY - 1)) for i in range(30)], [1] * 30) for s in starts]
        write_documents(root / name, documents, vocabulary=VOCABULARY)
    raw = {
        "target": str(root / "target"),
        "train": str(root / "train"),
        "held_out": str(root / "held_out"),
        "drafter": {"layers": 1, "block_size": 3, "taps": [0, 2], "markov_rank": 4},
        "loss": {"cross_entropy": 1.0, "l1": 0.1},
        "steps": 12,
        "batch": 4,
        "micro_batch": 2,
        "length": 30,
        "anchors": 5,
        "lr": 0.01,
        "device": "cpu",
        "log_every": 1,
        "save_every": 4,
        "evaluate_every": 6,
        "evaluate_sequences": 4,
    }
    return build(TrainConfig, raw, "recipe")
