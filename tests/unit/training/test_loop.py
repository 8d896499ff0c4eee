"""A run learns, is killed, continues with the same losses, and never saves what is no number."""

import json
from dataclasses import replace

import pytest
import yaml

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.training import loop
from dspark.training.config import as_plain
from dspark.training.drafter import even_taps
from dspark.training.features import FeatureConfig
from dspark.training.forward import goal
from dspark.training.loop import Trainer, main


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "evaluation" not in line}


CHANGES = [
    {"row_tokens": 70},
    {"start": "random"},
    {"optimizer": "muon", "features": FeatureConfig("cached", format="float8")},
    {"precision": "bfloat16", "features": FeatureConfig("hybrid", directory="memory")},
]


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


def test_a_loss_that_is_no_number_keeps_the_last_good_state(recipe, tmp_path, monkeypatch):
    trainer = Trainer(replace(recipe, save_every=2), tmp_path)

    def spoilt(*args, **kwargs):
        found = goal(*args, **kwargs)
        return replace(found, total=found.total * float("nan")) if trainer.step_number == 3 else found

    monkeypatch.setattr(loop, "goal", spoilt)
    with pytest.raises(UserError, match="loss is nan at step 4"):
        trainer.run()
    assert [path.name for path in trainer.checkpoints.finished()] == ["step-00000002"]
    monkeypatch.undo()
    assert Trainer(replace(recipe, save_every=2), tmp_path).step_number == 2


def test_mistakes_are_one_line_and_exit_2(recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_plain(recipe) | {"target": str(tmp_path / "none")}))
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    Trainer(replace(recipe, steps=4), tmp_path / "cut").run()
    (tmp_path / "cut" / "checkpoints" / "step-00000004" / "__0_0.distcp").write_bytes(b"half a file")
    path.write_text(yaml.safe_dump(as_plain(replace(recipe, steps=4))))
    assert main([str(path), "--out", str(tmp_path / "cut")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "step-00000004 is damaged: __0_0.distcp is not what was written; delete it" in errors[-1]


def test_taps_of_the_released_drafters():
    assert even_taps(36) == (1, 9, 17, 25, 33)
    assert max(even_taps(3)) < 3
