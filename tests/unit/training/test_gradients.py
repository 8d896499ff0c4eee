"""A step's gradient does not depend on how the batch was cut."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dspark.training.data import write_documents
from dspark.training.loop import Trainer


@pytest.fixture
def uneven(recipe, tmp_path):
    """Documents of different lengths and shares of supervision: a mean of means would be another mean."""
    rng = np.random.default_rng(3)
    documents = []
    for size in (30, 6, 12, 25, 8, 30, 5, 17):
        begin = int(rng.integers(0, size - 4))
        documents.append((rng.integers(0, 22, size).tolist(), [0] * begin + [1] * (size - begin)))
    write_documents(tmp_path / "uneven", documents, vocabulary=23)
    return replace(recipe, train=str(tmp_path / "uneven"), batch=4)


def gradients(config, out):
    trainer = Trainer(config, out)
    numbers = trainer.train_data.rows(0, config.batch, config.seed)
    goals = trainer.gradients(trainer.goal_of(trainer.train_data, 0), trainer.share(numbers))
    weight = sum(goal.weight for goal in goals)
    names = [name for name, p in trainer.drafter.named_parameters() if p.requires_grad]
    return weight, {name: p.grad / weight for name, p in zip(names, trainer.parameters, strict=True)}


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_give_the_gradient_of_the_whole(uneven, tmp_path, micro_batch):
    weight, whole = gradients(replace(uneven, micro_batch=4), tmp_path / "whole")
    cut_weight, cut = gradients(replace(uneven, micro_batch=micro_batch), tmp_path / "cut")
    torch.testing.assert_close(weight, cut_weight)
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, atol=1e-6, rtol=1e-4)
