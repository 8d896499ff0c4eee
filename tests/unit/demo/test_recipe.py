"""Recipes: the shipped one is valid, and a mistake is one sentence with the way out."""

from pathlib import Path

import pytest
import yaml

from dspark.common.errors import UserError
from dspark.demo.recipe import load_recipe

SHIPPED = Path(__file__).parents[3] / "recipes" / "demo_target.yaml"


def test_the_shipped_recipe_is_valid() -> None:
    recipe = load_recipe(SHIPPED)
    assert recipe.architecture.vocab_size == 4096
    assert recipe.stages[-1].lr[1] == 0.0


def change(path: Path, **changes) -> Path:
    raw = yaml.safe_load(SHIPPED.read_text())
    for key, value in changes.items():
        raw[key] = value
    path.write_text(yaml.safe_dump(raw))
    return path


STAGE = {"layers": 4, "length": 256, "tokens": 1000, "batch_tokens": 4096}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"muon_rl": 1}, "unknown key 'muon_rl'; did you mean 'muon_lr'"),
        ({"stages": [{**STAGE, "lenght": 2}]}, "did you mean 'length'"),
        ({"stages": [{"layers": 4}]}, "lacks 'length'"),
        ({"stages": []}, "at least one"),
        ({"stages": [{**STAGE, "length": 1 << 20}]}, "exceeds max_position_embeddings"),
        ({"stages": [STAGE, {**STAGE, "layers": 6}]}, "no multiple of the 4"),
        ({"stages": [STAGE, {**STAGE, "layers": 2, "grow": "identity"}]}, "less than the 4"),
        ({"stages": [{**STAGE, "grow": "stack"}]}, "use copy or identity"),
        ({"stages": [{**STAGE, "batch_tokens": 1000}]}, "must divide"),
        ({"architecture": 3}, "must be a mapping"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(change(tmp_path / "recipe.yaml", **changes))


def test_a_missing_file_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
