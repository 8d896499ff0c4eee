"""Every kind of drafter learns from a recipe, starts from what its kind was published with, and exports what loads."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from transformers import AutoConfig, Qwen3ForCausalLM

from dspark.common.errors import UserError
from dspark.drafters.registry import DRAFTERS, load_drafter
from dspark.models.target import Target
from dspark.training.config import TrainConfig, as_plain, build, load_config
from dspark.training.loop import Trainer
from dspark.training.shape import DEFAULT_LOSS, FIELDS, DrafterShape

SHAPES = {
    "dflash": {"kind": "dflash", "layers": 1, "sample_from_anchor": False},
    "eagle3": {"kind": "eagle3", "taps": [0, 2]},
    "eagle3, pruned": {"kind": "eagle3", "taps": [0, 2], "draft_vocabulary": 22, "every_position": True},
    "mtp": {"kind": "mtp", "block_size": 2},
    "medusa": {"kind": "medusa"},
    "medusa, own heads": {"kind": "medusa", "own_heads": True, "layers": 2},
    "layer_skip": {"kind": "layer_skip", "exit_layer": 1},
    "draft_model": {"kind": "draft_model", "layers": 1},
}


@pytest.fixture(scope="module")
def recipe(recipe, tmp_path_factory):
    """The shared recipe before a target that is sure of what it says."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(recipe.target)
    config.initializer_range = 0.4
    directory = tmp_path_factory.mktemp("sure")
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return replace(recipe, target=str(directory))


def recipe_of(recipe, shape, **changes):
    raw = as_plain(recipe) | {"drafter": {"block_size": 3} | shape, "loss": {}} | changes
    return build(TrainConfig, raw, "recipe")


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SHAPES)
def test_the_loss_falls_and_the_export_loads(recipe, tmp_path, name):
    config = recipe_of(recipe, SHAPES[name], steps=24, save_every=24, evaluate_every=24, lr=0.02)
    assert config.loss == DEFAULT_LOSS[config.drafter.kind]
    Trainer(config, tmp_path).run()
    lines = log_of(tmp_path)
    losses = [line["loss"] for line in lines if "evaluation" not in line]
    assert losses[-1] < losses[0] * (0.99 if name == "layer_skip" else 0.9)  # a norm alone learns little
    drafter = load_drafter(tmp_path / "export", Target.load(config.target, dtype="float32"), block_size=2)
    assert isinstance(drafter, DRAFTERS[config.drafter.kind])
    evaluation = next(line for line in lines if line.get("evaluation"))
    assert 1 < evaluation["tau"] <= 1 + config.drafter.block_size


@pytest.mark.parametrize("name", ["eagle3", "mtp", "medusa", "draft_model"])
def test_random_starts_and_sampled_anchors_learn_too(recipe, tmp_path, name):
    Trainer(recipe_of(recipe, SHAPES[name], steps=24, save_every=24, start="random", lr=0.02), tmp_path).run()
    losses = [line["loss"] for line in log_of(tmp_path) if "evaluation" not in line]
    assert losses[-1] < losses[0] * 0.9


def test_a_pruned_vocabulary_is_the_datas(recipe, tmp_path):
    trainer = Trainer(recipe_of(recipe, SHAPES["eagle3, pruned"]), tmp_path)
    tokens = torch.from_numpy(trainer.train_data.tokens.astype("int64"))
    assert set(tokens.unique().tolist()) <= set(trainer.drafter.draft_ids.tolist())  # 22 tokens occur at all
    row = trainer.drafter.lm_head.weight[5]
    assert torch.equal(row, trainer.target.head.weight[trainer.drafter.draft_ids[5]])
    assert trainer.drafter.lm_head.weight.requires_grad


@pytest.mark.parametrize("name", SHAPES)
def test_a_recipe_survives_being_written_down(recipe, tmp_path, name):
    config = recipe_of(recipe, SHAPES[name])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(as_plain(config)))
    assert load_config(tmp_path / "recipe.yaml") == config


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"kind": "eagle"}, ("'eagle' is not known", "eagle3")),
        ({"kind": "mtp", "layers": 2}, ("layers does not belong to kind mtp", "block_size")),
        ({"kind": "eagle3", "confidence_head": True}, ("confidence_head does not belong to kind eagle3",)),
        ({"kind": "dflash", "markov_rank": 256}, ("markov_rank does not belong to kind dflash",)),
        ({"kind": "medusa", "block_size": 0}, ("block_size is 0", "1 or more")),
    ],
)
def test_a_field_of_another_kind(recipe, shape, words):
    with pytest.raises(UserError) as caught:
        recipe_of(recipe, shape)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_loss_section_changes_what_it_names(recipe):
    config = recipe_of(recipe, SHAPES["eagle3"], loss={"l1": 0.5})
    assert config.loss == replace(DEFAULT_LOSS["eagle3"], l1=0.5)


def test_an_exit_past_the_target_and_a_misfit_of_code(recipe, tmp_path):
    with pytest.raises(UserError, match=r"exit_layer 3 is past the target's layers 0\.\.2"):
        Trainer(recipe_of(recipe, {"kind": "layer_skip", "exit_layer": 3}), tmp_path)
    with pytest.raises(UserError, match="own_heads does not belong to kind dspark"):
        DrafterShape(own_heads=True)


def test_fields_are_those_of_the_shape():
    assert {name for names in FIELDS.values() for name in names} == set(asdict(DrafterShape()))


def test_a_draft_model_of_another_vocabulary(recipe, tmp_path):
    config = AutoConfig.from_pretrained(recipe.target)
    config.vocab_size = 29
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="vocabulary of 29, the target 23"):
        Trainer(recipe_of(recipe, SHAPES["draft_model"], init=str(tmp_path / "other")), tmp_path / "out")


def test_a_copied_draft_model_of_all_layers_is_the_target(recipe, tmp_path):
    shape = {"kind": "draft_model", "layers": 3}
    trainer = Trainer(recipe_of(recipe, shape), tmp_path)
    assert min(trainer.evaluate()["acceptance"]) > 0.999
    with pytest.raises(UserError, match="layers is 4, the target has 3"):
        Trainer(recipe_of(recipe, shape | {"layers": 4}), tmp_path / "more")
