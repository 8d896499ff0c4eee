"""A target on the ragged batch equals the library's own forward: prefill, decode, verify after rollback, and mixed."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.common.errors import UserError
from dspark.models.batch import Ragged
from dspark.models.target import ATTENTION, Target

PAGE = 4
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "mistral": {"sliding_window": 6},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **SLIDING,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 61,
    },
}


def pair(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    ours_config = copy.deepcopy(config)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    ours = AutoModelForCausalLM.from_config(ours_config, dtype=torch.float32, attn_implementation=ATTENTION).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, Target(ours)


class Sequence:
    """Feeds one sequence's tokens, remembering what is in the pages."""

    def __init__(self, pages):
        self.pages, self.length = pages, 0

    def part(self, tokens):
        part = (tokens, self.length, self.pages)
        self.length += len(tokens)
        return part


def ragged(parts) -> Ragged:
    token, position, slot, cu = [], [], [], [0]
    for tokens, start, pages in parts:
        for offset, value in enumerate(tokens):
            token.append(value)
            position.append(start + offset)
            slot.append(pages[(start + offset) // PAGE] * PAGE + (start + offset) % PAGE)
        cu.append(len(token))
    return Ragged(
        torch.tensor(token),
        torch.tensor(position),
        torch.tensor(slot),
        torch.tensor([pages for _, _, pages in parts], dtype=torch.int32),
        torch.tensor(cu, dtype=torch.int32),
        torch.tensor([start for _, start, _ in parts], dtype=torch.int32),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_librarys(family):
    theirs, target = pair(family)
    pool = target.allocate(16, PAGE)
    generator = torch.Generator().manual_seed(1)
    text = {name: torch.randint(3, 61, (20,), generator=generator).tolist() for name in "abc"}
    with torch.no_grad():
        want = {name: theirs(torch.tensor([tokens])).logits[0] for name, tokens in text.items()}
    sequences = {name: Sequence(list(range(1 + 5 * i, 6 + 5 * i))) for i, name in enumerate("abc")}

    def run(**lengths):
        parts, expected = [], []
        for name, count in lengths.items():
            start = sequences[name].length
            parts.append(sequences[name].part(text[name][start : start + count]))
            expected.append(want[name][start : start + count])
        batch = ragged(parts)
        got, _ = target.forward(batch, pool, torch.arange(len(batch.token_T)))
        torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-4)

    run(a=9)  # prefill
    run(a=1)  # decode
    wrong = ragged([(text["b"][:5], sequences["a"].length, sequences["a"].pages)])
    target.forward(wrong, pool, torch.arange(5))  # rejected drafts, rolled back by length alone
    run(a=5)  # verification of 1+4 tokens over the stale slots
    run(a=1, b=7, c=12)  # decode and two prefills
    run(c=4, a=3, b=1)  # verification, verification, decode


def test_rows_and_taps():
    theirs, target = pair("qwen3")
    pool = target.allocate(8, PAGE)
    tokens = list(range(3, 13))
    batch = ragged([(tokens, 0, [1, 2, 3])])
    logits, taps = target.forward(batch, pool, torch.tensor([9, 4]), taps=(-1, 0, 3))
    with torch.no_grad():
        out = theirs(torch.tensor([tokens]), output_hidden_states=True)
    torch.testing.assert_close(logits, out.logits[0, [9, 4]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(taps[:, :32], out.hidden_states[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(taps[:, 32:64], out.hidden_states[1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.model.norm(taps[:, 64:]), out.hidden_states[4][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "recurrent_gemma", "falcon_mamba", "jamba"])
def test_models_with_recurrent_state_are_refused(family):
    config = AutoConfig.for_model(family, **{**SMALL, "num_experts": 2, "num_local_experts": 2})
    with pytest.raises(UserError, match="rolled back"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        Target(model.eval())


def test_a_tap_the_target_lacks_is_refused():
    _, target = pair("llama")
    batch = ragged([([5], 0, [1])])
    with pytest.raises(UserError, match=r"tap 4 .*-1\.\.3"):
        target.forward(batch, target.allocate(4, PAGE), torch.tensor([0]), taps=(4,))
