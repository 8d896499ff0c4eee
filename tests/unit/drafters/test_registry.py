"""load_drafter decides the kind and refuses what does not fit, naming both numbers."""

import pytest
from drafting import LAYERS, VOCABULARY, random_drafter, tiny_config
from transformers import Qwen3ForCausalLM

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.drafters.draft_model import DraftModel
from dspark.drafters.dspark import DSpark
from dspark.drafters.ngram import NGram, NoDraft
from dspark.drafters.registry import load_drafter


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    drafter, config = random_drafter()
    path = tmp_path_factory.mktemp("drafters") / "dspark"
    checkpoint.save(drafter, config, path)
    return path


def test_kinds(directory, target, target_directory):
    assert isinstance(load_drafter("none", target), NoDraft)
    assert isinstance(load_drafter("ngram", target), NGram)
    assert isinstance(load_drafter(target_directory, target), DraftModel)
    drafter = load_drafter(directory, target, block_size=3, markov_top_k=9)
    assert isinstance(drafter, DSpark)
    assert (drafter.block_size, drafter.markov_top_k, drafter.taps) == (3, 9, (0, 2))


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ({"vocab_size": 50}, ("61", "50")),
        ({"hidden_size": 16}, ("32", "16")),
        ({"num_hidden_layers": 2}, ("4 target layers", "2")),
    ],
)
def test_another_target_is_refused_with_both_numbers(directory, shape, numbers):
    with pytest.raises(UserError) as caught:
        load_drafter(directory, Held(Qwen3ForCausalLM(tiny_config(**shape))))
    assert all(number in str(caught.value) for number in numbers), caught.value


def test_a_tap_the_target_does_not_have(tmp_path, target):
    drafter, config = random_drafter(target_layer_ids=[0, LAYERS])
    checkpoint.save(drafter, config, tmp_path / "d")
    with pytest.raises(UserError, match=rf"layer {LAYERS}, .*0\.\.{LAYERS - 1}"):
        load_drafter(tmp_path / "d", target)


def test_draft_model_of_another_vocabulary(tmp_path, target):
    Qwen3ForCausalLM(tiny_config(vocab_size=VOCABULARY + 4)).save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match=rf"{VOCABULARY + 4}.*{VOCABULARY}"):
        load_drafter(tmp_path / "lm", target)


@pytest.mark.parametrize("source", ["/no/such/place", "./nowhere", "a b c", "nothing"])
def test_unknown_source(source, target):
    with pytest.raises(UserError, match="is no directory"):
        load_drafter(source, target)


def test_bad_numbers(directory, target):
    with pytest.raises(UserError, match=r"block_size 6 exceeds the drafter's 5; pass --block-size 5 or less"):
        load_drafter(directory, target, block_size=6)
    with pytest.raises(UserError, match="block_size is 0"):
        load_drafter(directory, target, block_size=0)
    with pytest.raises(UserError, match="markov_top_k is -1"):
        load_drafter(directory, target, markov_top_k=-1)


class Held:
    """Holds a model the way a Target does."""

    def __init__(self, model):
        self.model = model
