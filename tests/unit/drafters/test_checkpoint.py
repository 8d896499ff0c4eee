"""DeepSpec directories are read and written exactly; what is wrong with one is said in one line."""

import json

import pytest
import torch
from drafting import HIDDEN, VOCABULARY, drafter_fields, random_drafter
from safetensors.torch import load_file, save_file

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.drafters.vocab import TargetParts


@pytest.fixture
def saved(tmp_path):
    drafter, config = random_drafter()
    checkpoint.save(drafter, config, tmp_path / "drafter")
    return tmp_path / "drafter"


def refused(directory, *words, target=None):
    with pytest.raises(UserError) as caught:
        checkpoint.load(directory, target)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def rewrite(directory, **changes):
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            fields.pop(name)
        else:
            fields[name] = value
    path.write_text(json.dumps(fields))


def test_names_in_the_file_are_flat(saved):
    names = set(load_file(saved / "model.safetensors"))
    assert {"embed_tokens.weight", "lm_head.weight", "fc.weight", "layers.1.self_attn.q_norm.weight"} <= names
    assert {"markov_head.markov_w1.weight", "confidence_head.proj.bias", "hidden_norm.weight"} <= names
    assert not any(name.startswith("body") for name in names)


@pytest.mark.parametrize("kind", [{}, {"markov_head_type": "rnn"}, {"markov_rank": 0, "enable_confidence_head": False}])
def test_round_trip(tmp_path, kind):
    drafter, config = random_drafter(**kind)
    checkpoint.save(drafter, config, tmp_path / "d")
    again, config_again = checkpoint.load(tmp_path / "d")
    assert config_again == config
    assert type(again) is type(drafter)
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in drafter.state_dict().items()
    }


def test_saving_over_a_checkpoint_replaces_it_whole(saved):
    (saved / "stale.txt").write_text("old")
    drafter, config = checkpoint.load(saved)
    checkpoint.save(drafter, config, saved, dtype=torch.bfloat16)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["drafter"]
    assert load_file(saved / "model.safetensors")["fc.weight"].dtype == torch.bfloat16


def test_beside_a_target_its_tensors_are_shared_and_the_copies_may_be_absent(tmp_path, target):
    drafter, config = random_drafter()
    checkpoint.save(drafter, config, tmp_path / "d", frozen=False)
    refused(tmp_path / "d", "embed_tokens.weight", "beside its target")
    parts = TargetParts.of(target)
    loaded, _ = checkpoint.load(tmp_path / "d", parts)
    assert loaded.body.embed_tokens.weight.data_ptr() == parts.embedding_VD.data_ptr()
    assert loaded.body.lm_head is parts.head
    assert not any(p.is_meta for p in [*loaded.parameters(), *loaded.buffers()])


def test_confidence_head_with_markov_may_be_missing(saved):
    rewrite(saved, confidence_head_with_markov=None)
    assert checkpoint.load(saved)[0].confidence_head.rank == 8


def test_missing_and_misspelt_fields(saved):
    fields = (saved / "config.json").read_text()
    for name, way_out in [("block_size", "missing"), ("rms_norm_eps", "missing"), ("markov_rank", "missing")]:
        (saved / "config.json").write_text(fields)
        rewrite(saved, **{name: None})
        refused(saved, name, way_out)
    (saved / "config.json").write_text(fields.replace('"block_size"', '"blocksize"'))
    refused(saved, "'block_size' is missing", "rename 'blocksize'")
    (saved / "config.json").write_text(fields.replace('"markov_head_type"', '"markov_head_typ"'))
    refused(saved, "markov_head_typ", "did you mean 'markov_head_type'")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("block_size", 0, ["block_size is 0"]),
        ("block_size", "7", ["block_size is '7'"]),
        ("markov_head_type", "gatted", ["gatted", "vanilla, gated, rnn"]),
        ("mask_token_id", VOCABULARY, [str(VOCABULARY), "vocabulary"]),
        ("target_layer_ids", [], ["target_layer_ids is []"]),
        ("target_layer_ids", [0, -2], ["target_layer_ids"]),
        ("model_type", "mamba", ["mamba"]),
        ("architectures", ["LlamaForCausalLM"], ["LlamaForCausalLM", "Qwen3DSparkModel"]),
        ("num_attention_heads", "four", ["num_attention_heads is 'four'"]),
        ("layer_types", ["full_attention"], ["layer_types"]),
    ],
)
def test_wrong_values(saved, name, value, words):
    rewrite(saved, **{name: value})
    refused(saved, *words)


def test_damaged_weights(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(saved, "truncated or corrupted")
    path.write_bytes(b"\0" * 100)
    refused(saved, "truncated or corrupted")
    path.write_bytes(b"")
    refused(saved, "truncated or corrupted")
    path.unlink()
    refused(saved, "has no model.safetensors")


def test_missing_surplus_and_wrongly_shaped_tensors(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    fc = tensors.pop("fc.weight")
    save_file(tensors, path)
    refused(saved, "lacks fc.weight")
    save_file({**tensors, "fc.weight": fc[:, :-1].contiguous()}, path)
    refused(saved, "fc.weight", str([HIDDEN, 2 * HIDDEN - 1]), str([HIDDEN, 2 * HIDDEN]))
    save_file({**tensors, "fc.weight": fc, "layers.2.mlp.up_proj.weight": fc.clone()}, path)
    refused(saved, "layers.2.mlp.up_proj.weight")


def test_a_file_that_is_no_config(saved):
    (saved / "config.json").write_text("{")
    refused(saved, "not valid JSON")
    (saved / "config.json").write_bytes(b"\xff\xfe{}")
    refused(saved, "not valid JSON")
    (saved / "config.json").unlink()
    refused(saved, "has no config.json")


def test_rope_scaling_and_refusal(saved):
    base = drafter_fields()["rope_parameters"]["rope_theta"]
    scaled = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    rewrite(saved, rope_parameters=scaled)
    drafter, _ = checkpoint.load(saved)
    assert not drafter.body.backbone.rotary.inverse_frequency.is_meta
    rewrite(saved, rope_parameters={"rope_type": "dynamic", "rope_theta": base, "factor": 2.0})
    refused(saved, "dynamic")
