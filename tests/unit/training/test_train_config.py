"""A recipe's fields are checked name by name."""

from pathlib import Path

import pytest

from dspark.common.errors import UserError
from dspark.training.config import TrainConfig, as_plain, check_resumable, load_config
from dspark.training.objectives import Weights

PATHS = "target: t\ntrain: a\nheld_out: b\n"


def read(tmp_path, text, **overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_config(path, **overrides)


def test_defaults_sections_and_overrides(tmp_path):
    config = read(tmp_path, PATHS + "drafter: {taps: [1, 3], layers: 2}\nloss: {l1: 1}\nlr: 1", steps=7, target=None)
    assert config.drafter.taps == (1, 3)
    assert config.loss == Weights(l1=1.0)
    assert (config.steps, config.target, config.lr) == (7, "t", 1.0)
    assert as_plain(config)["drafter"]["taps"] == [1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: a\nheld_out: b\n", "lacks 'target'"),
        (PATHS + "stepz: 3", "unknown key 'stepz'; did you mean 'steps'"),
        (PATHS + "drafter: {layer: 3}", "drafter: unknown key 'layer'; did you mean 'layers'"),
        (PATHS + "drafter: 3", "drafter is 3; give a mapping"),
        (PATHS + "steps: many", "steps is 'many'; give a int"),
        (PATHS + "lr: 1e-3", "write 1.0e-3"),
        (PATHS + "steps: 0", "steps is 0"),
        (PATHS + "batch: 5", "batch 5 is no multiple of micro_batch 4"),
        (PATHS + "optimizer: sgd", "adamw or muon"),
        (PATHS + "length: 7", "length 7 has no room"),
        (PATHS + "row_tokens: 100", "row_tokens 100 is less than length 512"),
        (PATHS + "features: {mode: cache}", "use online, cached, hybrid"),
        (PATHS + "features: {mode: hybrid}\nshard_target: true", "needs the whole target on every rank"),
        ("- a", "give a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_mistakes(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_keeps_its_recipe():
    config = TrainConfig("t", "a", "b")
    check_resumable(TrainConfig("elsewhere", "a", "b", threads=1), as_plain(config))
    with pytest.raises(UserError, match=r"lr 0.0006, the recipe now says 0.1"):
        check_resumable(TrainConfig("t", "a", "b", lr=0.1), as_plain(config))


def test_recipes_in_the_repository_are_valid():
    recipes = Path(__file__).parents[3] / "recipes"
    assert load_config(recipes / "demo_drafter.yaml").drafter.block_size == 7


def test_a_recipe_lies_over_its_base(tmp_path):
    (tmp_path / "below.yaml").write_text(PATHS + "epochs: 3\nlr: 0.1\ndrafter: {layers: 2, block_size: 4}\n")
    config = read(tmp_path, "base: below.yaml\nlr: 0.2\ndrafter: {layers: 3}")
    assert (config.epochs, config.lr, config.drafter.layers, config.drafter.block_size) == (3.0, 0.2, 3, 4)
    assert read(tmp_path, "base: [below.yaml]\nsteps: 7").epochs == 0
    assert read(tmp_path, "base: below.yaml", steps=9).steps == 9
    with pytest.raises(UserError, match=r"below\.yml cannot be read"):
        read(tmp_path, "base: below.yml")
