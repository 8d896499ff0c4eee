"""A drafter is the same drafter in every format, and a variant that would be run wrongly is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from drafting import HIDDEN, LAYERS, VOCABULARY, drafter_fields, random_drafter, tiny_config
from safetensors.torch import load_file, save_file

from dspark.cli.main import main
from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.demo.pair import demo_drafter_path, demo_target_path
from dspark.drafters import checkpoint
from dspark.drafters.export import export
from dspark.drafters.formats import format_of
from dspark.drafters.registry import load_drafter
from dspark.engine.build import build_engine
from dspark.evaluation.acceptance import acceptance, measure
from dspark.models.loading import load_causal_lm
from dspark.models.target import Target

PARITY = Path(__file__).parents[2] / "parity"
BARE = {"markov_rank": 0, "enable_confidence_head": False, "confidence_head_with_markov": False}
KINDS = {
    "dspark": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    "no confidence": {"enable_confidence_head": False, "confidence_head_with_markov": False},
    "dflash": BARE,
    "dflash, mask slots": BARE | {"sample_from_anchor": False},
    "eagle3": {"architectures": ["Qwen3Eagle3Model"], "num_hidden_layers": 1, "layer_types": ["full_attention"]},
}
KINDS["eagle3"] |= {"ttt_length": 4, "target_layer_ids": [-1, 0, 3]}
KINDS["eagle3, pruned"] = KINDS["eagle3"] | {"draft_vocab_size": 20}


@pytest.fixture(scope="module")
def model(target_directory):
    """The target as the library loads it: nothing is packed."""
    return load_causal_lm(target_directory)


def stored(tmp_path, kind, **options):
    drafter, config = random_drafter(**KINDS[kind])
    if kind == "eagle3, pruned":
        drafter.adopt(torch.arange(0, 60, 3))
    checkpoint.save(drafter, config, tmp_path / "native", **options)
    return tmp_path / "native"


def fields(directory):
    return json.loads((directory / "config.json").read_text())


def rewrite(directory, section=None, **changes):
    raw = fields(directory)
    place = raw if section is None else raw[section]
    for name, value in changes.items():
        place.pop(name, None)
        if value is not None:
            place[name] = value
    (directory / "config.json").write_text(json.dumps(raw))


def same_tensors(one, other):
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_through_speculators(tmp_path, kind, dtype):
    native = stored(tmp_path, kind, dtype=dtype)
    export(native, tmp_path / "there", "speculators")
    export(tmp_path / "there", tmp_path / "back", "deepspec")
    same_tensors(native, tmp_path / "there") if kind != "eagle3" else None  # whose head gets maps of all tokens
    config, tensors = checkpoint.read_drafter(tmp_path / "back")
    original, theirs = checkpoint.read_drafter(native)
    if kind == "eagle3":  # the format has no frozen head: it is the drafter's own, over all tokens
        assert config.draft_vocab_size == VOCABULARY and set(tensors) - set(theirs) == {"d2t", "t2d"}
        assert all(torch.equal(tensors[name], theirs[name]) for name in theirs)
        return
    same_tensors(native, tmp_path / "back")
    assert config == original
    again, before = fields(tmp_path / "back"), fields(native)
    ours = [name for name in before if name in again and name != "_name_or_path"]
    assert {name: again[name] for name in ours} == {name: before[name] for name in ours}
    assert len(ours) == len(before) - 1 or kind.startswith("eagle3")  # whose fields were made from a block drafter's


@pytest.mark.parametrize("kind", ["dspark", "no confidence", "dflash, mask slots"])
def test_there_and_back_through_zlab(tmp_path, kind, model):
    native = stored(tmp_path, kind)
    export(native, tmp_path / "there", "zlab")
    names = set(load_file(tmp_path / "there" / "model.safetensors"))
    assert "fc.weight" in names and not names & {"embed_tokens.weight", "lm_head.weight"}
    with pytest.raises(UserError, match=r"no embed_tokens.weight.*--target"):
        export(tmp_path / "there", tmp_path / "back", "deepspec")
    config = export(tmp_path / "there", tmp_path / "back", "deepspec", model)
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (native, tmp_path / "back"))
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
    assert torch.equal(theirs["lm_head.weight"], model.lm_head.weight)
    assert config == checkpoint.read_drafter(native)[0]


def tau(directory, target):
    drafter = load_drafter(directory, target)
    core = build_engine(target, drafter, "full", max_running=4, prefix_caching=False, compile=False, seed=0)
    texts = ["import os\n\ndef ", "class Stack:\n    def __init__(self", "if __name__ == ", "def add(a, b):\n"]
    measured = measure(core, texts, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    return acceptance(measured.statistics)["tau"]


def test_the_engine_finds_the_same_tau_from_every_format_and_less_from_a_mixed_up_one(tmp_path):
    """On the embedded pair: the only one here that was trained, so that a wrong layout has something to lose."""
    target, native = Target.load(demo_target_path(), device="cpu"), demo_drafter_path()
    expected = tau(native, target)
    assert expected > 2
    for name in ("speculators", "zlab"):
        export(native, tmp_path / name, name)
        assert tau(tmp_path / name, target) == expected
    rewrite(tmp_path / "speculators", sample_from_anchor=None)  # the layout before: slot k is read as the token at k
    assert tau(tmp_path / "speculators", target) < 0.95 * expected  # its Markov head saves it from 1


def test_what_the_speculators_config_says(tmp_path, model):
    export(stored(tmp_path, "dflash, mask slots"), tmp_path / "there", "speculators", model)
    raw = fields(tmp_path / "there")
    assert raw["aux_hidden_state_layer_ids"] == [1, 3]  # taps 0 and 2
    assert raw["block_size"] == 6 and raw["sample_from_anchor"] is False  # the anchor's input and five mask slots
    assert raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    assert raw["speculators_config"]["verifier"] == {
        "name_or_path": model.config.name_or_path,
        "architectures": ["Qwen3ForCausalLM"],
    }
    assert raw["transformer_layer_config"]["num_hidden_layers"] == 2
    rewrite(tmp_path / "there", sample_from_anchor=None)
    assert checkpoint.read_drafter(tmp_path / "there")[0].sample_from_anchor is False  # missing: the older layout


def test_the_embedding_output_is_aux_layer_0(tmp_path):
    export(stored(tmp_path, "eagle3, pruned"), tmp_path / "there", "speculators")
    raw = fields(tmp_path / "there")
    assert raw["eagle_aux_hidden_state_layer_ids"] == [0, 1, 4] and raw["draft_vocab_size"] == 20
    assert checkpoint.read_drafter(tmp_path / "there")[0].taps == (-1, 0, 3)


@pytest.mark.parametrize("name", ["dspark_vanilla", "dspark_gated", "dspark_rnn", "dflash", "eagle3"])
def test_golden_values_hold_in_the_speculators_format(tmp_path, name):
    sys.path.insert(0, str(PARITY))
    import golden

    export(PARITY / "golden" / name, tmp_path / name, "speculators")
    shutil.copy(PARITY / "golden" / name / "io.safetensors", tmp_path / name)
    assert max(golden.replay(tmp_path / name).values()) <= golden.BOUND


def zlab_config(**changes):
    """As z-lab publishes it: rope at the top, block_size with the anchor, an auto_map."""
    shape = tiny_config(num_hidden_layers=2).to_dict()
    shape.pop("rope_parameters")
    return shape | {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": 8,
        "dflash_config": {"mask_token_id": 60, "target_layer_ids": [0, 2]},
        "num_target_layers": LAYERS,
        "rope_scaling": None,
        "rope_theta": 123456.0,
        **changes,
    }


def test_a_published_zlab_directory(tmp_path, target):
    tensors = load_file(stored(tmp_path, "dflash") / "model.safetensors")
    (tmp_path / "zlab").mkdir()
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith(("embed_tokens", "lm_head"))}
    save_file(body, tmp_path / "zlab" / "model.safetensors")
    (tmp_path / "zlab" / "config.json").write_text(json.dumps(zlab_config()))
    drafter, config = checkpoint.load(tmp_path / "zlab", checkpoint.TargetParts.of(target))
    assert (config.kind, config.block_size, config.taps, config.sample_from_anchor) == ("dflash", 7, (0, 2), False)
    assert config.mask_token_id == 60 and config.backbone.rope["rope_theta"] == 123456.0
    assert drafter.body.skip == 1 and format_of(zlab_config()) == "zlab"


def test_specforge_dspark_drafts_from_the_anchor():
    heads = {"projector_type": "dspark", "markov_rank": 8, "enable_confidence_head": True, "confidence_head_alpha": 1.0}
    raw = zlab_config(architectures=["DSparkDraftModel"], model_type="dspark")
    raw["dflash_config"] |= heads | {"confidence_head_with_markov": True}
    config = checkpoint.parse(checkpoint.formats.native(raw, "x"), "x")
    assert (config.kind, config.block_size, config.sample_from_anchor) == ("dspark", 8, True)
    assert config.markov_rank == config.confidence_rank == 8


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        (None, {"speculators_model_type": "mlp"}, ["'mlp'", "dspark, dflash, eagle3"]),
        (None, {"draft_vocab_size": 20}, ["20", str(VOCABULARY)]),
        (None, {"aux_hidden_state_layer_ids": None}, ["aux_hidden_state_layer_ids"]),
        (None, {"block_size": 0}, ["block_size is 0"]),
        (None, {"mask_token_id": 99}, ["99", str(VOCABULARY)]),
        (None, {"mask_token_id": None}, ["mask_token_id None", str(VOCABULARY)]),
        (None, {"norm_before_residual": True}, ["norm_before_residual"]),
        (None, {"markov_rank": 9}, ["markov_w1.weight", "[61, 8]", "[61, 9]"]),
        (None, {"projector_type": "domino"}, ["'domino'"]),
        (None, {"transformer_layer_config": None}, ["transformer_layer_config"]),
        ("transformer_layer_config", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer 1", "causal"]),
        ("transformer_layer_config", {"hidden_size": 16}, ["hidden size 16", str(HIDDEN)]),
        ("transformer_layer_config", {"vocab_size": 70}, ["61", "70"]),
    ],
)
def test_refused_speculators(tmp_path, target, section, changes, words):
    export(stored(tmp_path, "dspark"), tmp_path / "there", "speculators")
    rewrite(tmp_path / "there", section, **changes)
    with pytest.raises(UserError) as caught:
        checkpoint.load(tmp_path / "there", checkpoint.TargetParts.of(target))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_an_aux_layer_past_the_targets_last_is_refused(tmp_path, target):
    export(stored(tmp_path, "dspark"), tmp_path / "there", "speculators")
    rewrite(tmp_path / "there", aux_hidden_state_layer_ids=[1, LAYERS + 1])
    with pytest.raises(UserError, match=f"taps target layer {LAYERS}, .* layers 0..{LAYERS - 1}"):
        checkpoint.load(tmp_path / "there", checkpoint.TargetParts.of(target))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [0], "fc_layernorm": True}}, ["fc_layernorm"]),
        ({"dflash_config": {"mask_token_id": 1}}, ["target_layer_ids"]),
        ({"dflash_config": {"target_layer_ids": [0], "projector_type": "domino"}}, ["'domino'"]),
        ({"block_size": 1}, ["block_size is 1", "2 or more"]),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, ["layer 0", "causal"]),
    ],
)
def test_refused_zlab(changes, words):
    with pytest.raises(UserError) as caught:
        checkpoint.parse(checkpoint.formats.native(zlab_config(**changes), "x"), "x")
    assert all(word in str(caught.value) for word in words), caught.value


def test_formats_that_a_kind_does_not_have(tmp_path):
    native = stored(tmp_path, "dflash")
    with pytest.raises(UserError, match=r"sample_from_anchor is True .* use --format speculators"):
        export(native, tmp_path / "out", "zlab")
    with pytest.raises(UserError, match="format 'gguf' is not known; use deepspec, speculators, zlab"):
        export(native, tmp_path / "out", "gguf")
    with pytest.raises(UserError, match="exists"):
        export(native, native, "speculators")
    medusa = drafter_fields(architectures=["MedusaModel"], medusa_num_heads=2, medusa_num_layers=1)
    medusa |= {"medusa_own_heads": False, "target_layer_ids": [3]}
    config = checkpoint.parse(medusa, "x")
    checkpoint.save(
        checkpoint.build(config, torch.ones(61, 32), checkpoint.head_of(torch.ones(61, 32))), config, native
    )
    with pytest.raises(UserError, match="kind medusa has no speculators format"):
        export(native, tmp_path / "out", "speculators")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    native = stored(tmp_path, "dspark")
    (native / "calibration.json").write_text("{}")
    assert main(["export", str(native), "--format", "speculators", "--out", str(tmp_path / "out")]) == 0
    assert "dspark, γ 5, taps [0, 2], in the speculators format" in capsys.readouterr().out
    assert (tmp_path / "out" / "calibration.json").read_text() == "{}"
    assert main(["export", str(native), "--format", "speculators", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
