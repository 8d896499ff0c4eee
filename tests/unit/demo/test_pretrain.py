"""Pre-training: stages grow the model, a restart changes nothing, and the export loads as any model does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark.demo.corpus import Package
from dspark.demo.dataset import rows
from dspark.demo.network import build_model, deepened
from dspark.demo.pretrain import Trainer, lr_factor
from dspark.demo.recipe import Architecture, Stage, TargetRecipe
from dspark.demo.tokenizer import save_tokenizer, train_tokenizer

TINY = Architecture(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16
)
RECIPE = TargetRecipe(
    packages=(Package("stdlib"),),
    stages=(
        Stage(layers=1, length=16, tokens=512, batch_tokens=128, warmup_steps=2),
        Stage(layers=2, length=32, tokens=512, batch_tokens=128, lr=(1.0, 0.0)),
    ),
    architecture=TINY,
    micro_tokens=64,
    eval_tokens=256,
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name, size in (("train", 1000), ("held_out", 300)):
        np.save(tmp_path / f"{name}.npy", (np.arange(size) % 7 + 8 + generator.integers(0, 2, size)).astype(np.uint16))
    np.save(tmp_path / "token_bytes.npy", np.ones(320, dtype=np.int64))
    (tmp_path / "held_out.json").write_text("[]")
    save_tokenizer(train_tokenizer(["x = 1\n"] * 9, vocab_size=264), tmp_path / "tokenizer", context=64)
    return tmp_path


def test_rows_are_shifted_by_one_and_wrap() -> None:
    input_BT, target_BT = rows(np.arange(10, dtype=np.uint16), 6, 2, 3)
    assert input_BT.tolist() == [[6, 7, 8], [9, 0, 1]]
    assert target_BT.tolist() == [[7, 8, 9], [0, 1, 2]]


def test_the_learning_rate_warms_up_and_ends() -> None:
    stage = Stage(layers=1, length=8, tokens=100, batch_tokens=8, lr=(1.0, 0.2), warmup_steps=4)
    assert lr_factor(stage, 0, 0) == pytest.approx(0.25)
    assert lr_factor(stage, 50, 10) == pytest.approx(0.6)
    assert lr_factor(stage, 100, 20) == pytest.approx(0.2)


def test_a_new_model_is_the_embedding_alone() -> None:
    model = build_model(TINY, 2, 0)
    ids = torch.arange(20)[None]
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(states[0], states[1])


def test_stacking_repeats_the_layers_in_order() -> None:
    model = build_model(TINY, 2, 0)
    deep = deepened(model, TINY, 4, "copy")
    for i, layer in enumerate(deep.model.layers):
        for name, weight in layer.state_dict().items():
            assert torch.equal(weight, model.model.layers[i % 2].state_dict()[name])
    assert deepened(model, TINY, 2, "copy") is model


def test_growing_by_identity_keeps_the_function() -> None:
    model = build_model(TINY, 2, 0)
    for layer in model.model.layers:
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    deep = deepened(model, TINY, 3, "identity")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(deep(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert not torch.equal(deep.model.layers[0].mlp.up_proj.weight, deep.model.layers[2].mlp.up_proj.weight)


def test_a_run_goes_through_its_stages_and_exports(out: Path) -> None:
    trainer = Trainer(RECIPE, out)
    trainer.run()
    result = json.loads((out / "result.json").read_text())
    assert result["tokens"] == 1024 and result["stage"] == 2
    assert result["held_out_bits_per_byte"] < 8
    loaded = AutoModelForCausalLM.from_pretrained(out / "export")
    assert loaded.config.num_hidden_layers == 2 and loaded.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(out / "export")) == 264
    assert (out / "export" / "held_out.json").read_text() == "[]"
    ids = torch.arange(8, 20)[None]
    torch.testing.assert_close(loaded.float()(ids).logits, trainer.model(ids).logits, atol=0.05, rtol=0.05)


def test_a_restart_gives_the_same_weights(out: Path) -> None:
    stage = RECIPE.stages[0]
    straight = Trainer(RECIPE, out)
    for _ in range(2):
        straight.step(stage)
    straight.save()
    restarted = Trainer(RECIPE, out)
    assert restarted.progress == straight.progress
    for _ in range(2):
        straight.step(stage)
        restarted.step(stage)
    for one, other in zip(straight.model.parameters(), restarted.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_next_ends_a_stage(out: Path) -> None:
    trainer = Trainer(RECIPE, out)
    (out / "NEXT").touch()
    trainer.run()
    assert trainer.progress.tokens == 512
    assert not (out / "NEXT").exists()


@pytest.mark.parametrize("length", [1, 256, 300])
def test_the_training_attention_equals_the_librarys(length: int) -> None:
    torch.manual_seed(0)
    model = build_model(TINY, 2, 0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 320, (2, length))
    ours = model(ids, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
