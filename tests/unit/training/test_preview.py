"""The recipes of the repository are whole, cost what their targets' published sizes say, and run on a tiny model."""

from pathlib import Path

import pytest

from dspark.common.errors import UserError
from dspark.training.config import load_config
from dspark.training.preview import preview, rehearse

RECIPES = Path(__file__).parents[3] / "recipes"
TARGETS = {
    "qwen3_4b": "Qwen/Qwen3-4B",
    "qwen3_8b": "Qwen/Qwen3-8B",
    "qwen3_14b": "Qwen/Qwen3-14B",
    "gemma4_12b": "google/gemma-4-12B-it",
    "llama3_8b": "meta-llama/Llama-3.1-8B-Instruct",
}
KINDS = ("dspark", "dflash", "eagle3", "mtp")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_recipe_has_the_published_settings(kind, target):
    config = load_config(RECIPES / f"{kind}_{target}.yaml")
    assert (config.epochs, config.batch, config.lr, config.warmup, config.clip) == (10, 512, 6e-4, 0.04, 1.0)
    assert (config.length, config.anchors, config.precision, config.seed) == (4096, 512, "bfloat16", 42)
    assert (config.target, config.drafter.kind) == (TARGETS[target], kind)


def test_what_dspark_for_qwen3_4b_takes():
    found = preview(load_config(RECIPES / "dspark_qwen3_4b.yaml"), samples=1_300_000)
    assert found.target_parameters == 4_022_468_096
    assert found.steps == 25_391
    assert found.state == 16 * found.trained_parameters
    assert 600e6 < found.trained_parameters < 700e6
    assert found.memory > found.target + found.state


@pytest.mark.parametrize("recipe", ["dspark_qwen3_4b", "dflash_llama3_8b", "eagle3_gemma4_12b", "mtp_qwen3_8b"])
def test_a_rehearsal_trains_and_exports(recipe):
    first, last = rehearse(load_config(RECIPES / f"{recipe}.yaml"))
    assert 0 < last < 10 and 0 < first < 10


def test_taps_past_the_target_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: {RECIPES}/dspark_qwen3_4b.yaml\ndrafter: {{taps: [1, 36]}}\n")
    with pytest.raises(UserError, match=r"tap 36 is outside the target's layers -1\.\.35"):
        preview(load_config(path), samples=1)
