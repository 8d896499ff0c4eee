"""A run learns, is killed, continues with the same losses, and never saves what is no number."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.training.config import TrainConfig, as_plain, build
from dspark.training.data import write_documents
from dspark.training.drafter import even_taps
from dspark.training.loop import Trainer, main

VOCABULARY = 23


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A tiny target and text with structure a drafter can learn: numbers that count up."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
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


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "evaluation" not in line}


CHANGES = [{}, {"start": "random"}, {"optimizer": "muon"}, {"precision": "bfloat16", "remember_features": True}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_loss_falls_and_the_export_loads(recipe, tmp_path, change):
    config = replace(recipe, steps=40, save_every=40, evaluate_every=20, **change)
    Trainer(config, tmp_path).run()
    seen = losses(tmp_path)
    assert seen[40] < seen[1] - 0.3
    drafter, _ = checkpoint.load(tmp_path / "export")
    assert drafter.taps == (0, 2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line.get("evaluation")]
    assert [line["step"] for line in evaluations] == [20, 40]
    assert len(evaluations[0]["acceptance"]) == 3
    assert 1 <= evaluations[0]["tau"] <= 4
    assert json.loads((tmp_path / "run.json").read_text())["config"] == as_plain(config)


def test_dflash_and_a_warm_start(recipe, tmp_path):
    shape = replace(recipe.drafter, markov_rank=0, confidence_head=False)
    Trainer(replace(recipe, drafter=shape, steps=4), tmp_path / "cold").run()
    assert type(checkpoint.load(tmp_path / "cold" / "export")[0]).__name__ == "DFlash"
    warm = replace(recipe, drafter=shape, init=str(tmp_path / "cold" / "export"))
    Trainer(warm, tmp_path / "warm")
    with pytest.raises(UserError, match="another shape"):
        Trainer(replace(recipe, init=str(tmp_path / "cold" / "export")), tmp_path / "other")


def test_killed_and_continued_it_has_the_same_losses(recipe, tmp_path):
    whole = replace(recipe, steps=30)
    Trainer(whole, tmp_path / "whole").run()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_plain(whole)))
    command = [sys.executable, "-m", "dspark.training.loop", str(path), "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "cut" / "state.pt").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert main([str(path), "--out", str(tmp_path / "cut")]) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_loss_that_is_no_number_keeps_the_last_good_state(recipe, tmp_path, monkeypatch):
    trainer = Trainer(replace(recipe, save_every=2), tmp_path)
    goal = trainer.goal

    def spoilt(data, numbers, generator):
        found = goal(data, numbers, generator)
        return replace(found, total=found.total * float("nan")) if trainer.step_number == 3 else found

    monkeypatch.setattr(trainer, "goal", spoilt)
    with pytest.raises(UserError, match="loss is nan at step 4"):
        trainer.run()
    assert torch.load(tmp_path / "state.pt")["step"] == 2
    assert all(t.isfinite().all() for t in torch.load(tmp_path / "state.pt")["drafter"].values())


def test_mistakes_are_one_line_and_exit_2(recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_plain(recipe) | {"target": str(tmp_path / "none")}))
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    Trainer(replace(recipe, steps=4), tmp_path / "cut").run()
    (tmp_path / "cut" / "state.pt").write_bytes(b"half a file")
    path.write_text(yaml.safe_dump(as_plain(replace(recipe, steps=4))))
    assert main([str(path), "--out", str(tmp_path / "cut")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "state.pt is truncated or corrupted" in errors[-1]


def test_taps_of_the_released_drafters():
    assert even_taps(36) == (1, 9, 17, 25, 33)
    assert max(even_taps(3)) < 3
