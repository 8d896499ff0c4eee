"""A tiny random target on disk, shared by the drafters' tests."""

import pytest
import torch
from drafting import Greedy, tiny_config
from transformers import Qwen3ForCausalLM

from dspark.models.target import Target


@pytest.fixture
def greedy():
    return Greedy()


@pytest.fixture(scope="session")
def target_directory(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("target")
    Qwen3ForCausalLM(tiny_config(initializer_range=0.2)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def target(target_directory):
    return Target.load(target_directory, dtype="float32", device="cpu")
